# SPDX-License-Identifier: Apache-2.0
"""Texts at temperature 1 have the target's distribution; and this test can fail.

It fails for vLLM's own speculative decoding on a CPU, whose verification reads
uninitialised memory (`patches/cpu_verification.py`), and for the tempting stop rule
that drops a token because the drafter itself found it improbable.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from reference.llada import write_random_checkpoint
from spec_decode import joint
from spec_decode.harness import Engine, write_llama
from spec_decode.test_drafter import PROPOSER
from tiers import fast
from transformers import PreTrainedTokenizerFast
from vllm.sampling_params import StructuredOutputsParams

from vllm_dlm.spec_decode.aded.trigram_table import TrigramCounts, save_table
from vllm_dlm.spec_decode.drafter import Batch, Drafts
from vllm_dlm.spec_decode.options import METHODS, SpecDecPlusPlus
from vllm_dlm.spec_decode.sampling import draw_drafts
from vllm_dlm.spec_decode.specdec_pp.head import AcceptanceHead

SIZES = {"vocab_size": joint.VOCAB, "num_layers": 2, "hidden_size": 64, "spread": 0.3}
MANY = {"max_num_seqs": 64, "num_gpu_blocks_override": 80}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer, whose tokens are the letters a to f; c ends a text."""
    folder = write_llama(tmp_path_factory.mktemp("small"), seed=3, **SIZES)
    letters = {letter: number for number, letter in enumerate("abcdef")}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="e"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="c").save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def probability(small: Path) -> Any:
    return joint.probabilities(small, joint.PROMPT, temperature=1.0)


@pytest.fixture(scope="module")
def scripted(small: Path, engines: Callable[..., Engine]) -> Engine:
    own = SpecDecPlusPlus.proposer
    SpecDecPlusPlus.proposer = PROPOSER
    config = {"method": "specdec++", "model": str(small), "num_speculative_tokens": 2}
    engine = engines(config, model=small, skip_tokenizer_init=False, **MANY)
    SpecDecPlusPlus.proposer = own
    return engine


def drawing(keep: Callable[[list[float]], int], attach: bool = True) -> Any:
    """Drafts from a fixed distribution; `keep` says how many of a row's tokens.

    It is told the probabilities with which they were drawn.
    """
    logits = torch.tensor([[2.0, 0.0, 1.0, 0.5, -1.0, 1.5]])

    def script(batch: Batch) -> Drafts:
        rows, most = len(batch.limits), 2
        position = batch.num_tokens[:, None] + torch.arange(most).numpy()
        tokens, probs = draw_drafts(
            logits.repeat(rows * most, 1),
            torch.ones(rows * most),
            torch.zeros(rows * most, dtype=torch.int64),
            torch.ones(rows * most),
            torch.tensor(batch.seeds).repeat_interleave(most),
            torch.tensor(position.ravel()),
        )
        tokens, probs = tokens.view(rows, most), probs.view(rows, most, -1)
        own = probs.gather(2, tokens[..., None])[..., 0].tolist()
        drafts = [row[: keep(p)] for row, p in zip(tokens.tolist(), own, strict=True)]
        return Drafts(drafts, probs if attach else None)

    return script


def lagged(own: list[float]) -> int:
    """Stop behind an improbable token."""
    return next((i + 1 for i, p in enumerate(own) if p < 0.2), len(own))


def trimmed(own: list[float]) -> int:
    """Stop before it: the token's own draw decides, which biases what is left."""
    return next((i for i, p in enumerate(own) if p < 0.2), len(own))


@pytest.mark.parametrize(
    ("keep", "attach", "lossless"),
    [
        pytest.param(len, True, True, id="all", marks=pytest.mark.slow),
        pytest.param(lagged, True, True, id="lagged", marks=pytest.mark.slow),
        pytest.param(
            trimmed, False, True, id="trimmed, point masses", marks=pytest.mark.slow
        ),
        pytest.param(trimmed, True, False, id="trimmed", marks=pytest.mark.slow),
    ],
)
def test_stop_rules(
    scripted: Engine, probability: Any, keep: Any, attach: bool, lossless: bool
):
    scripted.drafter.script = drawing(keep, attach)
    observed = joint.counts(scripted, joint.PROMPT, joint.SAMPLES)
    assert not scripted.drafter.failed
    p = joint.p_value(observed, probability)
    assert p > joint.PASSES if lossless else p < joint.FAILS, p


def test_structured_outputs(scripted: Engine, small: Path):
    """The scheduler trims: it cuts a draft before what the grammar forbids."""
    scripted.drafter.script = drawing(len)
    options = {
        # Warm: where one token is nearly certain, a bias hardly shows.
        "temperature": 2.0,
        "structured_outputs": StructuredOutputsParams(regex="[ad]{3}"),
    }
    observed = joint.counts(scripted, joint.PROMPT, 1000, **options)
    assert not scripted.drafter.failed
    probability = joint.probabilities(small, joint.PROMPT, 2.0, forbidden=[1, 2, 4, 5])
    allowed = probability > 0
    assert allowed.sum() == 8 and not observed[~allowed].any()
    p = joint.p_value(observed[allowed], probability[allowed])
    assert p > joint.PASSES, p


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A speculative config of each method, with drafters that know nothing."""
    folder = tmp_path_factory.mktemp("drafters")
    diffusion = write_random_checkpoint(
        folder / "deer",
        seed=1,
        vocab_size=joint.VOCAB,
        mask_token_id=5,
        eos_token_id=4,
    )
    draft = write_llama(folder / "draft", seed=4, **SIZES)
    head = AcceptanceHead(SIZES["hidden_size"])
    torch.nn.init.normal_(head.output.weight, std=0.25)
    head.save(draft)
    grams = TrigramCounts(joint.VOCAB)
    generator = torch.Generator().manual_seed(0)
    grams.add(torch.randint(joint.VOCAB, (500,), generator=generator).tolist())
    save_table(folder / "trigrams.safetensors", grams.table())
    return {
        "deer": {"model": str(diffusion)},
        "specdec++": {"model": str(draft), "min_tokens": 1, "stop_threshold": 0.4},
        "del": {},
        "aded": {"corpus": str(folder / "trigrams.safetensors")},
        "lud": {"pad_token_id": 5, "threshold": 0.3},
        "jacobi": {},
    }


QUICK = [
    (method, runner, {}, joint.FEW) for method, runner in (("deer", 2), ("aded", 1))
]


@pytest.mark.parametrize(
    ("method", "runner", "changes", "samples"),
    # Drafts with their probabilities, and without.
    fast(
        *QUICK,
        of=[
            *QUICK,
            *((method, 1, {}, joint.SAMPLES) for method in METHODS),
            ("deer", 2, {}, joint.SAMPLES),
            ("del", 1, {"stop": "gain"}, joint.SAMPLES),
            ("aded", 1, {"memory": "shared"}, joint.SAMPLES),
        ],
    ),
    ids=str,
)
def test_each_method(
    small: Path,
    engines: Callable[..., Engine],
    configs: dict[str, dict[str, Any]],
    probability: Any,
    method: str,
    runner: int,
    changes: dict[str, Any],
    samples: int,
):
    config = {"method": method, "num_speculative_tokens": 3, **configs[method]}
    engine = engines(config, model=small, runner=runner, **MANY)
    drafter = engine.drafter
    own, drafted = drafter.options, drafter.counts["rows"]
    if changes:
        drafter.options = own.model_copy(update=changes)
        drafter.forget()
    observed = joint.counts(engine, joint.PROMPT, samples)
    if changes:
        drafter.options = own
        drafter.forget()
    assert drafter.counts["rows"] > drafted and not drafter.failed
    p = joint.p_value(observed, probability)
    assert p > joint.PASSES, p


@pytest.mark.slow
def test_structured_outputs_on_runner_v2(
    small: Path,
    engines: Callable[..., Engine],
    configs: dict[str, dict[str, Any]],
    tmp_path: Path,
):
    """The scheduler's cut of a draft does not bias texts there either."""
    drafter = tmp_path / "drafter"
    shutil.copytree(configs["deer"]["model"], drafter)
    for file in small.glob("*token*"):
        shutil.copy(file, drafter)
    config = {"method": "deer", "num_speculative_tokens": 3, "model": str(drafter)}
    engine = engines(config, model=small, runner=2, skip_tokenizer_init=False, **MANY)
    options = {
        "temperature": 2.0,
        "structured_outputs": StructuredOutputsParams(regex="[ad]{3}"),
    }
    observed = joint.counts(engine, joint.PROMPT, 1500, **options)
    assert engine.drafter.counts["rows"] and not engine.drafter.failed
    probability = joint.probabilities(small, joint.PROMPT, 2.0, forbidden=[1, 2, 4, 5])
    allowed = probability > 0
    assert not observed[~allowed].any()
    p = joint.p_value(observed[allowed], probability[allowed])
    assert p > joint.PASSES, p


def draft_model(model: Path) -> dict[str, Any]:
    return {"method": "draft_model", "model": str(model), "num_speculative_tokens": 2}


@pytest.mark.slow
def test_vllms_draft_model_beside_this_package(
    small: Path, engines: Callable[..., Engine], probability: Any
):
    engine = engines(draft_model(small), model=small, **MANY)
    observed = joint.counts(engine, joint.PROMPT, joint.SAMPLES)
    p = joint.p_value(observed, probability)
    assert p > joint.PASSES, p


STOCK = """
import json, sys
from pathlib import Path
from reference.llada import write_random_checkpoint
from spec_decode import joint
from spec_decode.harness import Engine
model, config, options = map(json.loads, sys.argv[1:])
engine = Engine(Path(model), config, **options)
print(json.dumps(joint.counts(engine, joint.PROMPT, joint.SAMPLES).tolist()))
"""


@pytest.mark.slow
def test_vllms_draft_model_without_it(small: Path, probability: Any):
    """Where this one fails, vLLM has mended its kernel, and ours can go."""
    arguments = map(json.dumps, (str(small), draft_model(small), MANY))
    tests = str(Path(__file__).parents[1])
    reply = subprocess.run(
        [sys.executable, "-c", STOCK, *arguments],
        env=os.environ | {"VLLM_DLM_DISABLE": "1", "PYTHONPATH": tests},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert reply.returncode == 0, reply.stderr[-2000:]
    observed = torch.tensor(json.loads(reply.stdout.splitlines()[-1]))
    p = joint.p_value(observed, probability)
    assert p < joint.FAILS, p
