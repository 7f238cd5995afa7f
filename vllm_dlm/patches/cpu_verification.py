# SPDX-License-Identifier: Apache-2.0
"""What verification of drafts needs on a CPU without Triton, and vLLM 0.32 has wrong.

Its kernel that gives each draft token its request's temperature, top-k and top-p
converts the output to int64 and writes into the copy: these are uninitialised memory
then, and texts at temperature > 0 come from wrong distributions. Its kernel that
accepts or rejects reads the probability of token -1, by which the scheduler marks
"no draft" (the Triton kernel rejects it), and may put that into a text. The ledger
(`patches.py`) wraps both, for every model and method.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch


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
    values = torch.where(input_val == replace_from, replace_to, input_val)
    ends = cu_num_tokens.long()
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    output.copy_(values.repeat_interleave(counts))


def rejecting_absent_drafts(original: Callable[..., None]) -> Callable[..., None]:
    """vLLM's accept-or-reject kernel, for which token -1 is no draft."""

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
            uniform_probs.masked_fill(absent, torch.nan),
            *args,
            **kwargs,
        )

    return rejection_random_sample_kernel


def constraints_of_no_draft(original: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's temperature, top-k and top-p of drafts, where a step has none.

    On a CPU it takes the maximum of an empty tensor, and the engine dies.
    """

    def apply_sampling_constraints(
        logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        return original(logits, *args, **kwargs) if len(logits) else logits

    return apply_sampling_constraints


def without_offsets(original: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's bookkeeping of a step, where a seeded request's prompt goes on.

    It takes back the draw that such a request's sample has cost, which a CPU's
    generator cannot: the engine dies. Here the state from before the draw is put back
    (`remembering_states`).
    """

    def bookkeeping(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        kept = {row: generators.pop(row) for row in _going_on(self)}
        for row, generator in kept.items():
            generator.set_state(self.dlm_generator_states[row])
        try:
            return original(self, *args, **kwargs)
        finally:
            generators.update(kept)

    return bookkeeping


def remembering_states(original: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's sampling of a step; keeps what `without_offsets` puts back."""

    def sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        self.dlm_generator_states = {
            row: generators[row].get_state() for row in _going_on(self)
        }
        return original(self, *args, **kwargs)

    return sample


def _going_on(runner: Any) -> list[int]:
    """Rows of seeded requests whose sample is thrown away: their prompt goes on."""
    batch = runner.input_batch
    discarded = runner.discard_request_mask.np[: batch.num_reqs]
    return [row for row in batch.generators if discarded[row]]


WRAPPERS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "vllm.utils.cpu_triton_utils:_expand_kernel_impl": lambda _: expand_kernel,
    "vllm.utils.cpu_triton_utils:_rejection_random_sample_kernel_impl": (
        rejecting_absent_drafts
    ),
    "vllm.v1.sample.rejection_sampler:apply_sampling_constraints": (
        constraints_of_no_draft
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample": remembering_states,
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._bookkeeping_sync": without_offsets,
}
"""Entries of the ledger -> makers of their replacement."""


def misfits() -> list[str]:
    """One sentence for each symbol whose first parameters are not what ours takes."""
    from vllm import __version__

    from vllm_dlm.patches.ledger import find

    found = []
    for symbol, make in WRAPPERS.items():
        try:
            original = inspect.unwrap(find(symbol)[2])
        except RuntimeError:
            continue  # the ledger's own check says so
        theirs = list(inspect.signature(original).parameters)
        ours = [
            name
            for name, parameter in inspect.signature(make(original)).parameters.items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        if theirs[: len(ours)] != ours:
            found.append(
                f"{symbol} of vLLM {__version__} takes {', '.join(theirs)}, and "
                f"vllm-dlm's own begins with {', '.join(ours)}"
            )
    return found
