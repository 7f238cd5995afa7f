# SPDX-License-Identifier: Apache-2.0
"""Step maps as a user gets them: per output token its step, log-probability, edits.

A request asks with the option `step_map`. Offline, `step_map(output)` reads them off
a finished output; over HTTP each choice has a `step_map` object. See
`model_executor/step_maps.py` for how they travel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vllm_dlm.admission.client_fields import has_place_for, options_field
from vllm_dlm.config.request_options import read_request

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import SamplingParams

    from vllm_dlm.config.request import RequestConfig

COLUMNS = 3
"""Of an output's rows, if they are a step map: step, log-probability, edited."""

LEAST_LOGPROB = -9999.0
"""JSON has no infinity; vLLM's chat log-probabilities end here too."""


@dataclass(frozen=True)
class StepMap:
    """How an output was decoded; one entry per output token in each list but one."""

    steps: list[int]
    """Denoise step that wrote the token, from 0 over the whole request; -1 for a mask
    that is left over (`reference_exact` only)."""
    logprobs: list[float]
    """Natural log-probability of the token in that step, of the raw logits."""
    edited: list[bool]
    """Whether the position held another token before, or was masked again."""
    beyond: list[int]
    """Steps of the positions behind the text in its last block, -1 where none was
    written: they are not returned, but were seen."""


def step_map(output: RequestOutput | CompletionOutput) -> StepMap:
    """The step map of a finished output of a request that set `step_map`.

    Args:
        output: with `n` above 1 one of `RequestOutput.outputs`.

    Raises:
        ValueError: there is none, or there are several.
    """
    completions: list[CompletionOutput] = getattr(output, "outputs", [output])
    if len(completions) != 1:
        raise ValueError(
            f"the request has {len(completions)} outputs, with a step map each: pass "
            "one of its `outputs`"
        )
    rows = completions[0].routed_experts
    if rows is None or not has_step_map(completions[0]):
        raise ValueError(
            "this output has no step map: set the request's option step_map, and wait "
            "until the output is finished"
        )
    steps, logprobs, edited = rows.T[:COLUMNS]
    end = len(completions[0].token_ids)
    return StepMap(
        steps=steps[:end].astype(int).tolist(),
        logprobs=logprobs[:end].clip(min=LEAST_LOGPROB).tolist(),
        edited=edited[:end].astype(bool).tolist(),
        beyond=steps[end:].astype(int).tolist(),
    )


def add_to_choices(choices: Iterable[Any], outputs: Iterable[CompletionOutput]) -> None:
    """Give each choice of an HTTP answer its step map, if its request asked."""
    for choice, output in zip(choices, outputs, strict=True):
        if has_step_map(output):
            choice.step_map = asdict(step_map(output))
        if output.routed_experts is not None:
            choice.routed_experts = None


def has_step_map(output: CompletionOutput) -> bool:
    """Whether a finished output's request asked for its step map."""
    rows = output.routed_experts
    # A column alone says where tokens lie in a canvas whose holes shrink.
    return rows is not None and rows.shape[1] >= COLUMNS


def refuse_without_place(config: RequestConfig, params: SamplingParams) -> None:
    """A step map comes with a finished output, which a stream has no place for.

    Raises:
        VLLMValidationError: a streamed request asks for one, or a request of a route
            whose answers have no place for one either (HTTP 400).
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import RequestOutputKind

    if config.step_map and not has_place_for("step_map"):
        asked = read_request(params.extra_args)
        # What the server turns on for all is not said where nobody asks.
        if asked.has("step_map"):
            name = asked.names["step_map"]
            raise VLLMValidationError(
                f"{name}: an answer of this route has no place for a step map; leave "
                "it out, or use /v1/completions or /v1/chat/completions",
                parameter=f"{options_field()}.{name}",
            )
        return
    if config.step_map and params.output_kind == RequestOutputKind.DELTA:
        raise VLLMValidationError(
            "step_map comes with the whole answer, and this request is streamed: set "
            "`stream` to false, or leave step_map out",
            parameter="stream",
        )
