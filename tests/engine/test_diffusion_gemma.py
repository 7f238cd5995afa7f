# SPDX-License-Identifier: Apache-2.0
"""vLLM's own diffusion model, DiffusionGemma, served by vLLM with the plugin there.

What is vLLM's stays vLLM's, but for two faults of its model, which are mended: its
texts are those of transformers, fed the same random numbers. With `stock` nothing is
mended, and all of it is as without the plugin.

Each engine runs in a process of its own (this file is its program): the stand-in for
torchvision stays out of other tests, and a second process may leave parts of the
plugin out. The stock CPU wheel cannot run the model without our platform: its model
runner V2 needs Triton. So what is compared with is an engine with that platform alone
(`VLLM_PLUGINS=dlm_cpu`): no models, config classes, hooks or front end of ours.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.platforms import vllm_version_matches_substr

if not vllm_version_matches_substr("cpu"):
    pytest.skip("needs a CPU build of vLLM", allow_module_level=True)

PROMPTS = [[2, 5, 6, 7, 8], list(range(2, 40))]
CANVASES = 3
MIXED = [[2, 5, 6, 7, 8], [2, 40, 30, 20, 10, 50, 60, 70]]
"""Prompts behind which three canvases end within the window of the sliding layers."""
BEYOND = [(7 * i + 3) % 120 for i in range(60)]
CANVAS = [(37 * i + 11) % 120 for i in range(16)]
REFUSED: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.5},
    "seed": {"seed": 1},
    "min_p": {"min_p": 0.5},
    "min_tokens": {"min_tokens": 1},
    "logit_bias": {"logit_bias": {3: 1.0}},
    "allowed_token_ids": {"allowed_token_ids": [3]},
}


def report(folder: str, mode: str, draws: str) -> dict[str, Any]:
    """What an engine is made of, what it generates, and what it refuses.

    Args:
        mode: the option `diffusion_gemma`; "alone" where there are no options of ours.
        draws: file for the random numbers of the requests that are `drawn`.
    """
    import torch
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMValidationError

    options = {} if mode == "alone" else {"dlm": {"diffusion_gemma": mode}}
    llm = LLM(
        folder,
        additional_config=options,
        dtype="float32",
        enforce_eager=True,
        disable_log_stats=True,
        skip_tokenizer_init=True,
        limit_mm_per_prompt={"image": 0, "video": 0},
        max_model_len=128,
        max_num_seqs=4,
        block_size=32,
        num_gpu_blocks_override=40,
    )
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    parts = {
        "model": runner.model,
        "state": runner.model_state,
        "sampler": runner.sampler,
        "config": llm.llm_engine.model_config.hf_config,
        "scheduler": core.scheduler,
    }

    def generate(prompts: list[list[int]], max_tokens: int, **options: Any) -> Any:
        params = SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, detokenize=False, **options
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        return [output.outputs[0] for output in outputs]

    def refusal(**options: Any) -> str:
        try:
            generate(PROMPTS[:1], 4, **options)
        except VLLMValidationError as error:
            return str(error)
        return ""

    def text(requests: list[list[int]], behind: int) -> list[list[int]]:
        """Texts of `CANVASES` canvases; each request begins some steps behind."""
        engine, tokens = llm.llm_engine, {}
        params = SamplingParams(
            max_tokens=CANVASES * len(CANVAS), ignore_eos=True, detokenize=False
        )
        waiting = list(enumerate(requests))
        while waiting or engine.has_unfinished_requests():
            if waiting:
                number, prompt = waiting.pop(0)
                engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
            for _ in range(behind if waiting else 1):
                for output in engine.step():
                    tokens[int(output.request_id)] = output.outputs[0].token_ids
        return [list(tokens[number]) for number in range(len(requests))]

    # First: its random numbers are those of the engine's seed.
    tokens = [output.token_ids for output in generate(PROMPTS, 40)]
    one_step = {"diffusion_seed_canvas": CANVAS, "diffusion_max_steps": 1}
    steps = generate(PROMPTS, len(CANVAS), extra_args=one_step)
    filtered = generate(PROMPTS, 20, top_k=20, top_p=0.9, logprobs=2)
    with recorded() as mixed_draws:
        mixed = text(MIXED, 4)
    with recorded() as beyond_draws:
        beyond = text([BEYOND], 1)
    torch.save([mixed_draws, beyond_draws], draws)
    return {
        "drawn": [mixed, beyond],
        "parts": {name: full_name(type(part)) for name, part in parts.items()},
        "tokens": tokens,
        "one step": [output.token_ids for output in steps],
        "filtered": [output.token_ids for output in filtered],
        "logprobs": [len(output.logprobs) for output in filtered],
        "refusals": {name: refusal(**case) for name, case in REFUSED.items()},
        "our options": refusal_of_our_options(folder),
        "our options in a request": refusal(extra_args={"dlm_steps": 4}),
        "loaded": sorted(name for name in sys.modules if name.startswith("vllm_dlm.")),
    }


@contextmanager
def recorded() -> Iterator[list[tuple[str, Any]]]:
    """Note what vLLM's sampler draws on a CPU: "uniform" [rows, V], "ids" [R, C]."""
    import torch

    found: list[tuple[str, Any]] = []
    uniform, ids = torch.rand_like, torch.randint

    def rand_like(*args: Any, **kwargs: Any) -> torch.Tensor:
        found.append(("uniform", uniform(*args, **kwargs)))
        return found[-1][1].clone()

    def randint(*args: Any, **kwargs: Any) -> torch.Tensor:
        found.append(("ids", ids(*args, **kwargs)))
        return found[-1][1].clone()

    torch.rand_like, torch.randint = rand_like, randint
    try:
        yield found
    finally:
        torch.rand_like, torch.randint = uniform, ids


class Draws:
    """The recorded random numbers of a request, canvas by canvas.

    A step of the sampler draws first the tokens, then the noise. What is drawn without
    a step before is the first canvas of a request: once when it is admitted, in vain,
    and once when its prompt is computed. A commit draws both too, of which the noise
    becomes the next canvas.
    """

    def __init__(self, found: list[tuple[str, Any]], request: int, calls: int) -> None:
        """
        Args:
            request: its place in the batch; those before end before it does.
            calls: how often a canvas calls the sampler, commit included.
        """
        self.calls = calls
        alone, steps = [], []
        for (_, drawn), (kind, ids) in pairwise([("ids", None), *found]):
            if kind == "ids":
                is_step = drawn is not None and drawn.dtype.is_floating_point
                (steps if is_step else alone).append((drawn, ids))
        self.first = alone[2 * request + 1][1][0]
        mine = [step for step in steps if len(step[1]) > request]
        if request:
            # The others have ended, and the places are filled up.
            mine += steps[len(mine) + self._before(steps, request) :]
        self.steps = [
            (drawn.view(len(ids), len(CANVAS), -1)[row], ids[row])
            for drawn, ids in mine
            for row in [min(request, len(ids) - 1)]
        ]

    @staticmethod
    def _before(steps: list[tuple[Any, Any]], request: int) -> int:
        """Steps of the sampler before a request took part."""
        return next(i for i, step in enumerate(steps) if len(step[1]) > request)

    def noise(self, canvas: int, step: int) -> Any:
        if (canvas, step) == (0, 0):
            return self.first
        return self.steps[canvas * self.calls + step - 1][1]

    def gumbel(self, canvas: int, step: int) -> Any:
        uniform = self.steps[canvas * self.calls + step][0].clamp(min=1e-20)
        return -(-uniform.log()).log()


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def refusal_of_our_options(folder: str) -> str:
    """What is said to an engine of this model with options of ours."""
    from vllm.engine.arg_utils import EngineArgs

    options = {"dlm": {"cache": "none"}}
    try:
        EngineArgs(folder, additional_config=options).create_engine_config()
    except ValueError as error:
        return str(error)
    return ""


# The tests ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from reference.diffusion_gemma import write_torchvision_stand_in

    environment = {
        **os.environ,
        "VLLM_LOGGING_LEVEL": "ERROR",
        # What vLLM compiles even in an eager engine takes longer than all the rest.
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_DLM_DISABLE": "0",
    }
    if importlib.util.find_spec("torchvision") is None:
        folder = tmp_path_factory.mktemp("packages")
        paths = [str(write_torchvision_stand_in(folder)), os.getenv("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return environment


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from reference.diffusion_gemma import write_random_checkpoint

    folder = tmp_path_factory.mktemp("diffusion-gemma")
    return write_random_checkpoint(folder, seed=0, canvas_length=len(CANVAS))


@pytest.fixture(scope="module")
def served(checkpoint: Path, environment: dict[str, str]) -> dict[str, Any]:
    return run_report(checkpoint, environment)


def run_report(
    folder: Path, environment: dict[str, str], mode: str = "native"
) -> dict[str, Any]:
    """`report` in a fresh interpreter."""
    draws = folder.parent / f"draws-{mode}.pt"
    done = subprocess.run(
        [sys.executable, __file__, str(folder), mode, str(draws)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    found["draws"] = torch.load(draws)
    return found


def test_every_part_is_vllms_own(served):
    module = "vllm.model_executor.models.diffusion_gemma."
    schedulers = "vllm.v1.core.sched.diffusion_scheduler."
    parts = dict(served["parts"])
    assert parts.pop("scheduler") in {
        schedulers + "DiffusionScheduler",
        schedulers + "DiffusionAsyncScheduler",
    }
    assert parts == {
        "model": module + "DiffusionGemmaForConditionalGeneration",
        "state": module + "DiffusionGemmaModelState",
        "sampler": module + "DiffusionSampler",
        "config": (
            "transformers.models.diffusion_gemma.configuration_diffusion_gemma."
            "DiffusionGemmaConfig"
        ),
    }


def test_nothing_of_our_engine_is_loaded(served):
    assert "vllm_dlm.plugin" in served["loaded"]
    ours = {
        f"vllm_dlm.model_executor.{name}"
        for name in (
            *("scheduling.scheduler", "state", "sampling.sampler"),
            *("planning.segments", "models.llada"),
        )
    }
    assert all(importlib.util.find_spec(name) for name in ours)
    assert not ours & set(served["loaded"])


def test_it_generates(served):
    assert [len(tokens) for tokens in served["tokens"]] == [40, 40]
    assert [len(tokens) for tokens in served["filtered"]] == [20, 20]
    assert served["logprobs"] == [20, 20]
    assert all(len(set(tokens)) > 10 for tokens in served["tokens"])


def test_a_denoising_step_is_that_of_transformers(served, checkpoint):
    from reference.diffusion_gemma import denoise_once

    expected = [denoise_once(checkpoint, prompt, CANVAS) for prompt in PROMPTS]
    assert served["one step"] == expected
    # Not the canvas itself, nor the same for every prompt.
    assert expected[0] != CANVAS and expected[0] != expected[1]


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_refuses_is_refused_in_its_words(served, name):
    assert (
        "sampling parameters are not yet supported with diffusion models"
        in served["refusals"][name]
    )


def test_our_options_are_refused(served, checkpoint):
    message = served["our options"]
    assert "the dlm options (cache) are for diffusion language models" in message
    assert str(checkpoint) in message
    message = served["our options in a request"]
    assert "dlm_steps: options of diffusion language models" in message


def expected_text(checkpoint: Path, prompt: list[int], draws: Draws) -> list[int]:
    from reference.diffusion_gemma import generate

    return generate(checkpoint, prompt, CANVASES, draws.noise, draws.gumbel)


def by_canvas(tokens: list[int]) -> list[list[int]]:
    return [tokens[i : i + len(CANVAS)] for i in range(0, len(tokens), len(CANVAS))]


STEPS = 6


def mixed_texts(report: dict[str, Any], checkpoint: Path) -> list[tuple[Any, Any]]:
    """Each request's canvases, and those of transformers with the same draws."""
    drawn = [Draws(report["draws"][0], request, STEPS + 1) for request in (0, 1)]
    return [
        (by_canvas(tokens), by_canvas(expected_text(checkpoint, prompt, draws)))
        for tokens, prompt, draws in zip(report["drawn"][0], MIXED, drawn, strict=True)
    ]


def test_every_canvas_is_that_of_transformers(served, checkpoint):
    """Two requests, one of which denoises while the other commits."""
    from reference.diffusion_gemma import WINDOW

    for prompt, (tokens, expected) in zip(
        MIXED, mixed_texts(served, checkpoint), strict=True
    ):
        assert len(prompt) + CANVASES * len(CANVAS) <= WINDOW
        assert tokens == expected
        assert len(set(map(tuple, expected))) == CANVASES


@pytest.mark.xfail(strict=True, reason="vLLM's window is symmetric for canvas rows")
def test_a_canvas_beyond_the_window_is_that_of_transformers(served, checkpoint):
    draws = Draws(served["draws"][1], 0, STEPS + 1)
    assert served["drawn"][1] == [expected_text(checkpoint, BEYOND, draws)]


@pytest.mark.slow
def test_stock_changes_nothing(served, checkpoint, environment):
    """The mended model differs from it, and from transformers it differs."""
    alone = run_report(checkpoint, environment | {"VLLM_PLUGINS": "dlm_cpu"}, "alone")
    assert "vllm_dlm.platform" in alone["loaded"]
    assert "vllm_dlm.plugin" not in alone["loaded"]
    stock = run_report(checkpoint, environment, "stock")
    ours = {"loaded", "our options", "our options in a request", "draws"}
    for what in set(alone) - ours:
        assert alone[what] == stock[what], what
    for what in set(alone) - ours - {"drawn", "tokens", "one step", "filtered"}:
        assert alone[what] == served[what], what
    for tokens, expected in mixed_texts(stock, checkpoint):
        assert all(a != b for a, b in zip(tokens[1:], expected[1:], strict=True))


if __name__ == "__main__":
    print(json.dumps(report(*sys.argv[1:])))
