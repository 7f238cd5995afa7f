# SPDX-License-Identifier: Apache-2.0
"""Verification of drafts on a CPU without Triton, where vLLM has faults.

Its kernel that gives each draft token its request's temperature, top-k and top-p
converts the output to int64 and writes into the copy: these are uninitialised memory
then, and texts at temperature > 0 come from wrong distributions. Its kernel that
accepts or rejects reads the probability of token -1, by which the scheduler marks
"no draft" (the Triton kernel rejects such a draft), and may put that into a text.
Every model and every method of speculative decoding meets these faults, vLLM's own too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_dlm.patches.ledger import Where, apply, entries, find, patch

if TYPE_CHECKING:
    import torch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

_WHEN_RIGHT = "tests/spec_decode/test_verification_cpu.py passes without it"
_NO_OFFSET = "docs/upstream.md#a-chunked-seeded-prompt-ends-a-cpu-engine"


@patch(
    "vllm.utils.cpu_triton_utils:_expand_kernel_impl",
    why=(
        "It writes into a copy, so that drafts get uninitialised memory for their "
        "temperature, top-k and top-p: speculative decoding at temperature > 0 draws "
        "from wrong distributions on a CPU."
    ),
    upstream="docs/upstream.md#draft-tokens-get-uninitialised-parameters-on-a-cpu",
    drop_when=_WHEN_RIGHT,
    where=Where.CPU_WORKER,
    mends_vllm=True,
)
def expanding_in_place(_: Callable[..., None]) -> Callable[..., None]:
    """Replaced, for every model."""
    return expand_kernel


def expand_kernel(
    output: torch.Tensor,
    input_val: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """Repeat each request's value for each of its tokens, in place.

    Args:
        output: [tokens], written.
        input_val: [requests], of any type.
        cu_num_tokens: [requests], how many tokens end with each request.
        replace_from: a value that stands for `replace_to`.
        replace_to: what it stands for.
        MAX_NUM_TOKENS: of the launch, not needed here.
    """
    import torch

    values = torch.where(input_val == replace_from, replace_to, input_val)
    ends = cu_num_tokens.long()
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    output.copy_(values.repeat_interleave(counts))


@patch(
    "vllm.utils.cpu_triton_utils:_rejection_random_sample_kernel_impl",
    why=(
        "It reads the probability of token -1, which stands for no draft, and may "
        "accept it."
    ),
    upstream="docs/upstream.md#a-draft-of-no-token-may-be-accepted-on-a-cpu",
    drop_when=_WHEN_RIGHT,
    where=Where.CPU_WORKER,
    mends_vllm=True,
)
def rejecting_absent_drafts(original: Callable[..., None]) -> Callable[..., None]:
    """Token -1 is no draft, and never accepted."""

    def rejection_random_sample_kernel(
        output_token_ids: torch.Tensor,
        cu_num_draft_tokens: torch.Tensor,
        draft_token_ids: torch.Tensor,
        draft_probs: torch.Tensor | None,
        target_probs: torch.Tensor,
        bonus_token_ids: torch.Tensor,
        recovered_token_ids: torch.Tensor,
        uniform_probs: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        absent = draft_token_ids < 0
        original(
            output_token_ids,
            cu_num_draft_tokens,
            draft_token_ids.clamp(min=0),
            draft_probs,
            target_probs,
            bonus_token_ids,
            recovered_token_ids,
            # No ratio of probabilities is as large as NaN.
            uniform_probs.masked_fill(absent, float("nan")),
            *args,
            **kwargs,
        )

    return rejection_random_sample_kernel


@patch(
    "vllm.v1.sample.rejection_sampler:apply_sampling_constraints",
    why=(
        "With top-k, and without top-p, a step without drafts ends a CPU's engine: "
        "the maximum of an empty tensor."
    ),
    upstream="docs/upstream.md#top-k-alone-ends-a-cpu-engine",
    drop_when=_WHEN_RIGHT,
    where=Where.CPU_WORKER,
    mends_vllm=True,
)
def constraints_of_no_draft(original: Callable[..., Any]) -> Callable[..., Any]:
    """Does nothing where there is no draft."""

    def apply_sampling_constraints(
        logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        return original(logits, *args, **kwargs) if len(logits) else logits

    return apply_sampling_constraints


@patch(
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample",
    why=(
        "A seeded request whose prompt is computed in chunks ends a CPU's engine: what "
        "its thrown-away sample drew is taken back by an offset, which a CPU's "
        "generator does not have."
    ),
    upstream=_NO_OFFSET,
    drop_when=_WHEN_RIGHT,
    where=Where.CPU_WORKER,
    mends_vllm=True,
)
def remembering_states(original: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps the states of such requests' generators, for `without_offsets`."""

    def sample(self: GPUModelRunner, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        self.dlm_generator_states = {
            row: generators[row].get_state() for row in _going_on(self)
        }
        return original(self, *args, **kwargs)

    return sample


@patch(
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._bookkeeping_sync",
    why="The same fault, where the draw is taken back.",
    upstream=_NO_OFFSET,
    drop_when=_WHEN_RIGHT,
    where=Where.CPU_WORKER,
    mends_vllm=True,
)
def without_offsets(original: Callable[..., Any]) -> Callable[..., Any]:
    """Puts back the states from before the draw."""

    def bookkeeping(self: GPUModelRunner, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        kept = {row: generators.pop(row) for row in _going_on(self)}
        for row, generator in kept.items():
            generator.set_state(self.dlm_generator_states[row])
        try:
            return original(self, *args, **kwargs)
        finally:
            generators.update(kept)

    return bookkeeping


def _going_on(runner: GPUModelRunner) -> list[int]:
    """Rows of seeded requests whose sample is thrown away: their prompt goes on."""
    batch = runner.input_batch
    discarded = runner.discard_request_mask.np[: batch.num_reqs]
    return [row for row in batch.generators if discarded[row]]


def apply_verification_patches() -> None:
    """Right verification of drafts on a CPU; call it in a worker, before its model.

    What this vLLM lacks is left out, with a warning: most engines verify nothing, and
    those that do are refused by `require_verification`.
    """
    from vllm.logger import init_logger
    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON:
        for entry in entries(__name__, Where.CPU_WORKER):
            try:
                apply([entry])
            except RuntimeError as error:
                init_logger(__name__).warning("%s", error)


def require_verification() -> None:
    """Refuse to speculate on a CPU whose verification could not be mended.

    Raises:
        RuntimeError: this vLLM lacks a symbol of an entry above.
    """
    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON:
        for entry in entries(__name__, Where.CPU_WORKER):
            find(entry.symbol)


def misfits() -> list[str]:
    """One sentence for each symbol whose first parameters are not what ours takes."""
    from vllm import __version__

    found = []
    for entry in entries(__name__, Where.CPU_WORKER):
        try:
            original = inspect.unwrap(find(entry.symbol)[2])
        except RuntimeError:
            continue  # the ledger's own check says so
        theirs = list(inspect.signature(original).parameters)
        parameters = inspect.signature(entry.make(original)).parameters
        ours = [
            name
            for name, parameter in parameters.items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        if theirs[: len(ours)] != ours:
            found.append(
                f"{entry.symbol} of vLLM {__version__} takes {', '.join(theirs)}, and "
                f"vllm-dlm's own begins with {', '.join(ours)}"
            )
    return found
