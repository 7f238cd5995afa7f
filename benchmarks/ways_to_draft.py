# SPDX-License-Identifier: Apache-2.0
"""The ways to draft that `benchmarks.speculation` compares, and their options."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.answers import Config
from vllm_dlm.config.aliases import resolve

DRAFT = "llama-tiny-draft"


@dataclass(frozen=True)
class Setting:
    """One way to draft."""

    method: str
    label: str
    config: Config | None

    @property
    def name(self) -> str:
        return f"{self.method} ({self.label})" if self.label else self.method


def settings(
    fixed: Sequence[int], folder: Path, corpus: Path, has_drafters: bool, deer: Config
) -> list[Setting]:
    """All that is compared.

    Args:
        fixed: lengths of vLLM's own methods.
        folder: for what is made only to be measured.
        corpus: ADED's tri-grams.
        has_drafters: whether the model is llama-tiny.
        deer: options of the method `deer`, its drafter among them.
    """
    return [
        Setting("plain", "", None),
        *(
            Setting(
                "ngram",
                f"K={k}",
                {
                    "method": "ngram",
                    "num_speculative_tokens": k,
                    "prompt_lookup_max": 3,
                    "prompt_lookup_min": 1,
                },
            )
            for k in fixed
        ),
        *([suffix()] if find_spec("arctic_inference") else ()),
        *(with_drafters(fixed, folder, deer) if has_drafters else ()),
        *(
            Setting(
                "aded",
                f"{source}, {memory}",
                {"method": "aded", "memory": memory} | own,
            )
            for source, own in (("texts", {}), ("corpus", {"corpus": str(corpus)}))
            for memory in ("request", "shared")
        ),
    ]


def suffix() -> Setting:
    """vLLM's suffix decoding: it remembers the answers of earlier requests."""
    return Setting("suffix", "as it is", {"method": "suffix"})


def parallel_drafter(folder: Path) -> Path:
    """llama-tiny-draft as vLLM's parallel drafting takes it, which is PARD's way.

    It was not trained for that: its mask token has never been read. So this shows what
    parallel drafting computes, and not what a PARD checkpoint would gain.
    """
    copy = folder / "parallel"
    if not copy.exists():
        shutil.copytree(resolve(DRAFT), copy)
        config = copy / "config.json"
        mask = json.loads((copy / "tokenizer_config.json").read_text())["mask_token"]
        tokens = json.loads((copy / "tokenizer.json").read_text())["added_tokens"]
        [number] = [token["id"] for token in tokens if token["content"] == mask]
        options = json.loads(config.read_text()) | {"pard_token": number}
        config.write_text(json.dumps(options))
    return copy


def with_drafters(fixed: Sequence[int], folder: Path, deer: Config) -> list[Setting]:
    """What needs a drafter, or exits, that llama-tiny has."""
    draft = resolve(DRAFT)
    return [
        *(
            Setting(
                "parallel",
                f"K={k}",
                {
                    "method": "draft_model",
                    "model": str(parallel_drafter(folder)),
                    "num_speculative_tokens": k,
                    "parallel_drafting": True,
                },
            )
            for k in fixed
        ),
        *(
            Setting(
                "draft_model",
                f"K={k}",
                {"method": "draft_model", "model": draft, "num_speculative_tokens": k},
            )
            for k in fixed
        ),
        *(
            Setting(
                "specdec++",
                f"stop {threshold}",
                {"method": "specdec++", "model": DRAFT, "stop_threshold": threshold},
            )
            for threshold in (0.5, 0.7, 0.9)
        ),
        *(
            Setting(
                "deer",
                f"K={k}",
                {"method": "deer", "num_speculative_tokens": k} | deer,
            )
            for k in (8, 32)
        ),
        Setting("del", "request", {"method": "del"}),
        Setting("del", "shared", {"method": "del", "statistics": "shared"}),
    ]
