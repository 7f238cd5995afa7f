# SPDX-License-Identifier: Apache-2.0
"""A stable name for a model's weights, to file what was learned about them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vllm_dlm.files.whole_files import open_file

_SHAPE_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "mask_token_id",
)


def model_key(model: str, revision: str | None, hf_config: Any) -> str:
    """Readable name plus a digest of architecture, shape and weight files.

    Folders of one name with the same weights share a key, wherever they lie; weights
    fine-tuned from them do not. A hub id and its revision are taken at their word.

    Args:
        model: local folder or hub id.
        revision: hub revision, if one was asked for.
        hf_config: the model's configuration.
    """
    facts: dict[str, Any] = {
        "architectures": getattr(hf_config, "architectures", None),
        **{name: getattr(hf_config, name, None) for name in _SHAPE_FIELDS},
    }
    folder = Path(model)
    if folder.is_dir():
        facts["weights"] = weights_digest(folder)
    else:
        facts["hub"] = [model, revision]
    text = json.dumps(facts, sort_keys=True)
    name = "".join(c if c.isalnum() or c in "-._" else "-" for c in folder.name)
    short = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
    return f"{name[:40]}-{short}"


def weights_digest(folder: Path) -> str:
    """32 hex digits of the weight files in a folder, read in part."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.glob("*.safetensors")):
        with open_file(file, "weights") as stream:
            digest.update(f"{file.name}:{file.stat().st_size};".encode())
            # The header names every tensor; the head of the data tells
            # fine-tunes of one shape apart without reading gigabytes.
            digest.update(stream.read(1 << 20))
    return digest.hexdigest()
