# SPDX-License-Identifier: Apache-2.0
"""Think coarse, critic fine (TCCF): long blocks up to a token, then one at a time.

A request thinks in the model's blocks until its text ends with the trigger (`</think>`,
say). What the blocks hold right of it is dropped, the check text is appended to the
output as if the model had written it, and the rest is decoded in blocks of one token.
The scheduler preempts the request there: it is admitted again with all its tokens,
whose KV is computed anew, because blocks of one have another. Source: TDAR, arXiv
2602.09555, whose code runs the two stages on two engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_dlm.config.request import RequestConfig
from vllm_dlm.messages import quote
from vllm_dlm.option_types import ThinkCoarse

MOST_TOKENS = {"trigger": 64, "check": 1024}
"""The trigger is looked for behind every token; the check text is computed as such."""


@dataclass(frozen=True)
class Stages:
    """The option `tccf` of a request, as token ids."""

    trigger: tuple[int, ...]
    check: tuple[int, ...]

    @classmethod
    def of(cls, option: ThinkCoarse | None, model_config: Any) -> Stages | None:
        """The stages that a request asks for, if it does.

        Raises:
            ValueError: a text has no tokens, or there is no tokenizer to tell; ids
                that the model has no token for.
        """
        if option is None:
            return None
        return cls(
            _token_ids("trigger", option.trigger, model_config),
            _token_ids("check", option.check, model_config),
        )

    def first_stage(self, before: Sequence[int], new: Sequence[int]) -> int:
        """How many of the `new` tokens, behind those of `before`, belong to it."""
        length = len(self.trigger)
        tokens = [*before[max(len(before) - length + 1, 0) :], *new]
        known = len(tokens) - len(new)
        for end in range(known + 1, len(tokens) + 1):
            if tuple(tokens[max(end - length, 0) : end]) == self.trigger:
                return end - known
        return len(new)

    def end_with(self, output: Sequence[int]) -> bool:
        """Whether the first stage ends with the last token of an output."""
        return tuple(output[-len(self.trigger) :]) == self.trigger

    def is_over(self, output: Sequence[int]) -> bool:
        """Whether an output is in the second stage: it goes on behind the trigger."""
        return self.first_stage((), output) < len(output)


def one_at_a_time(config: RequestConfig) -> RequestConfig:
    """How the second stage is decoded."""
    return replace(
        config, block_length=1, sub_block_length=1, steps=None, steps_per_block=None
    )


def _token_ids(name: str, text: str | list[int], model_config: Any) -> tuple[int, ...]:
    if not isinstance(text, str):
        return _checked(name, tuple(text), model_config)
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(model_config)
    if tokenizer is None:
        raise ValueError(
            f"tccf: {name} is a text, and the server has no tokenizer; give token ids"
        )
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    if not ids:
        raise ValueError(f"tccf: {name} {quote(text)} has no tokens")
    return _checked(name, ids, model_config)


def _checked(name: str, ids: tuple[int, ...], model_config: Any) -> tuple[int, ...]:
    """The ids, if the model has tokens for them and they are not too many."""
    size, most = model_config.get_vocab_size(), MOST_TOKENS[name]
    if len(ids) > most:
        raise ValueError(
            f"tccf: {name} has {len(ids)} tokens; at most {most} are taken"
        )
    beyond = [token for token in ids if not 0 <= token < size]
    if beyond:
        raise ValueError(
            f"tccf: {name} has ids that are no tokens of this model: {quote(beyond)}; "
            f"valid are 0 to {size - 1}"
        )
    return ids
