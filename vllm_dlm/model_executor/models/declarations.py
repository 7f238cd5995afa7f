# SPDX-License-Identifier: Apache-2.0
"""What the families' HF configs share: filling gaps, names, and the final check."""

from __future__ import annotations

import os
from pathlib import PurePath
from typing import Any, get_args

from vllm_dlm.config.model import EDIT_TOKEN_FIELDS, Attention, attention_of
from vllm_dlm.model_executor.models.config_fields import KINDS

UNKNOWN_MASK_ID = -1
"""Mask id of a family whose checkpoints must name it themselves."""


def fill(given: dict[str, Any], **defaults: Any) -> None:
    """Set in `given` what config.json leaves out or leaves null."""
    for name, value in defaults.items():
        if given.get(name) is None:
            given[name] = value


def set_fields(config: Any, given: dict[str, Any]) -> None:
    """Set `given` on a config whose parent has no such fields.

    Transformers looks at some of them (heads, context, RoPE) while it is still made.
    """
    for name in KINDS.keys() & given.keys() - {"dtype", "torch_dtype"}:
        setattr(config, name, given[name])


def stop_ids(
    given: dict[str, Any], mask_token_id: int, ids: tuple[int, ...]
) -> tuple[int, ...]:
    """The family's stop `ids`, if the checkpoint has the family's tokenizer.

    A checkpoint that names another mask id has other ids altogether.
    """
    return ids if given.get("mask_token_id") in (None, mask_token_id) else ()


def checkpoint_name(given: dict[str, Any]) -> str:
    """The checkpoint's own name, e.g. `SDAR-4B-Chat-b16`; "" if it is not known.

    It is the last part of a hub id or folder; a snapshot in the hub cache
    (`models--OWNER--NAME/snapshots/COMMIT`) is named by its repository.
    """
    path = str(given.get("name_or_path") or "")
    parts = PurePath(os.path.abspath(path) if os.path.isdir(path) else path).parts
    for part in reversed(parts):
        if part.startswith("models--"):
            return part.rpartition("--")[2]
    return parts[-1] if parts else ""


def check_declarations(hf_config: Any) -> None:
    """Check what a model declares, once overrides have been applied.

    Raises:
        ValueError: a declaration is missing or impossible; the message names the
            field, and how to set it.
    """
    attention = attention_of(hf_config)
    mask = hf_config.mask_token_id
    if attention not in get_args(Attention):
        problem = (
            f"dlm_class is {attention!r}, not full, block or causal: neither "
            "config.json nor the checkpoint's name says what its positions see"
        )
        example = '{"dlm_class": "full"}'
    elif getattr(hf_config, "dlm_noise", "mask") == "uniform":
        return
    elif mask == UNKNOWN_MASK_ID:
        problem = "mask_token_id is not known: config.json does not name it"
        example = '{"mask_token_id": ID}'
    elif not 0 <= mask < hf_config.vocab_size:
        problem = (
            f"mask_token_id {mask} is outside the vocabulary of {hf_config.vocab_size}"
        )
        example = '{"mask_token_id": ID}'
    elif edits := _problem_with_edit_tokens(hf_config):
        problem = edits
        example = '{"delete_token_id": ID, "split_token_id": ID}'
    elif expands := _problem_with_expand_token(hf_config):
        problem = expands
        example = '{"expand_token_id": ID}'
    else:
        return
    raise ValueError(
        f"{problem}; set it in config.json, or with --hf-overrides '{example}'"
    )


def _problem_with_expand_token(hf_config: Any) -> str:
    """What is wrong with the token that asks for masks; "" if nothing is."""
    token = getattr(hf_config, "expand_token_id", None)
    if token is None or 0 <= token < hf_config.vocab_size:
        return ""
    return (
        f"expand_token_id {token} is outside the vocabulary of {hf_config.vocab_size}"
    )


def _problem_with_edit_tokens(hf_config: Any) -> str:
    """What is wrong with the tokens that delete and insert; "" if nothing is."""
    ids = {
        name: getattr(hf_config, name)
        for name in EDIT_TOKEN_FIELDS
        if getattr(hf_config, name, None) is not None
    }
    if not ids:
        return ""
    named = " and ".join(f"{name} {id_}" for name, id_ in ids.items())
    if len(ids) < len(EDIT_TOKEN_FIELDS):
        return f"there is {named}, and not the other of {', '.join(EDIT_TOKEN_FIELDS)}"
    if any(not 0 <= id_ < hf_config.vocab_size for id_ in ids.values()):
        return f"{named} are not both inside the vocabulary of {hf_config.vocab_size}"
    if len({*ids.values(), hf_config.mask_token_id}) <= len(ids):
        return (
            f"{named} are not two ids besides mask_token_id {hf_config.mask_token_id}"
        )
    return ""
