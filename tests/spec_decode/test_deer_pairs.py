# SPDX-License-Identifier: Apache-2.0
"""DEER: every layout of a diffusion model drafts, and what cannot draft is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reference import checkpoints
from reference.checkpoints import write_checkpoint
from spec_decode import deer_reference
from spec_decode.deer_reference import BLOCK, IDS, PROMPTS, Reference, speculative
from spec_decode.harness import Engine, Rounds, params


@pytest.fixture
def no_engine_left() -> Iterator[None]:
    """A start that fails must not keep the next engine from starting."""
    yield
    from vllm.distributed.parallel_state import destroy_model_parallel

    destroy_model_parallel()


@pytest.mark.parametrize(
    ("drafter", "context", "message"),
    [
        ("draft", "auto", r"drafter is a 'llama'.*`vllm-dlm models`"),
        ("llada", "cached", "context 'cached': .*both directions"),
    ],
)
@pytest.mark.usefixtures("no_engine_left")
def test_wrong_drafters_are_refused(
    drafter: str,
    context: str,
    message: str,
    target: Path,
    draft: Path,
    tmp_path: Path,
):
    folder = draft if drafter == "draft" else Reference(drafter, tmp_path).folder
    with pytest.raises(ValueError, match=message):
        Engine(target, speculative(folder, context))


OTHER_LAYOUTS: dict[str, dict[str, Any]] = {
    "a2d_qwen3": {"dlm_class": "full"},
    "a2d_qwen2": {"dlm_class": "full"},
    "a2d_llama": {"dlm_class": "block"},
    "llada2_2": {"delete_token_id": 58, "split_token_id": 59},
    "dream_reasoner": {"block_size": BLOCK},
    "stable_diffcoder": {},
}
"""Of those that the engine serves, besides `FAMILIES` and those that are refused."""


@pytest.mark.slow
@pytest.mark.parametrize("runner", [1, 2])
@pytest.mark.parametrize("family", OTHER_LAYOUTS)
def test_every_layout_drafts(
    family: str,
    runner: int,
    tmp_path: Path,
    plain: Engine,
    target: Path,
):
    ids = IDS | {"pad_token_id": 61}
    folder = write_checkpoint(
        family, tmp_path / family, seed=2, **ids, **OTHER_LAYOUTS[family]
    )
    prompts, ends = PROMPTS[:4], params(24)
    wanted = plain.run(prompts, ends)
    engine = Engine(target, {"method": "deer", "model": str(folder)}, runner=runner)
    defaults = engine.drafter.defaults
    assert engine.drafter.most_masks == defaults.block_length
    rounds = Rounds(engine.drafter)
    assert engine.run(prompts, ends) == wanted
    rounds.close()
    assert not engine.drafter.failed and engine.drafter.counts["head_rows"] > 24
    drafted = {t for r in rounds.of.values() for _, draft in r for t in draft}
    assert len(drafted) > 5 and defaults.mask_token_id not in drafted


def test_every_layout_is_tested():
    refused = {"llada_moe", "sdar_moe", "rnd1"}
    assert {*OTHER_LAYOUTS, *deer_reference.FAMILIES, *refused} == {
        "llada",
        *checkpoints.FAMILIES,
    }


@pytest.mark.slow
@pytest.mark.usefixtures("no_engine_left")
def test_wrong_pairs_are_refused(tmp_path: Path, target: Path):
    llada = Reference("llada", tmp_path / "llada").folder
    with pytest.raises(ValueError, match="does not apply to a diffusion"):
        Engine(llada, speculative(llada))
    Reference("llada", tmp_path / "wide", vocab_size=128)
    with pytest.raises(ValueError, match="vocab"):
        Engine(target, speculative(tmp_path / "wide"))
    for family in ("llada_moe", "sdar_moe", "rnd1"):
        experts = write_checkpoint(
            family, tmp_path / family, seed=0, **IDS, pad_token_id=61
        )
        with pytest.raises(ValueError, match="drafts only for a mixture of experts"):
            Engine(target, speculative(experts))
