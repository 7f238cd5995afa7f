# SPDX-License-Identifier: Apache-2.0
"""Think coarse, critic fine (TCCF): long blocks for thoughts, then one at a time.

A request is decoded in the model's blocks until its text ends with the trigger
(`</think>`, say), with an end of text, or with the last of the tokens that thoughts may
have. What ended it is dropped, and so is what the blocks hold right of it; the check
text is appended to the output as if the model had written it, and the rest is decoded
in blocks of one token. In between, the scheduler preempts the request, which is then
admitted again with all its tokens: their KV is computed anew, because it depends on the
blocks.

Options leave it at the trigger alone, keep the trigger, and set how many tokens the
second stage has.
Source: TDAR, arXiv 2602.09555, whose code runs the two stages on two engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm_dlm.config.request import RequestConfig
from vllm_dlm.messages import quote
from vllm_dlm.option_types import ThinkCoarse

if TYPE_CHECKING:
    from vllm.config import ModelConfig

MOST_TOKENS = {"trigger": 64, "check": 1024}
"""The trigger is looked for behind every token; the check text is computed whole."""

CRITIC_TOKENS = 4096
"""Tokens that the second stage has in the published code."""

SECOND_STAGE = "dlm_second_stage"
"""Key of `SamplingParams.extra_args` by which the scheduler tells the workers that a
request is in its second stage. It begins as options do but is none: who sends it is
refused."""


@dataclass(frozen=True)
class Stages:
    """The option `tccf` of a request, as token ids."""

    trigger: tuple[int, ...]
    check: tuple[int, ...]
    keep_trigger: bool = False
    always: bool = True
    critic_tokens: int | None = None

    @classmethod
    def of(cls, option: ThinkCoarse | None, model_config: ModelConfig) -> Stages | None:
        """Make token ids of the option's texts; None without the option.

        Raises:
            ValueError: a text has no tokens, or there is no tokenizer; token ids are
                too many, or the model has no such tokens.
        """
        if option is None:
            return None
        return cls(
            _token_ids("trigger", option.trigger, model_config),
            _token_ids("check", option.check, model_config),
            option.keep_trigger,
            option.always,
            option.critic_tokens,
        )

    def check_budget(self, max_tokens: int) -> None:
        """Refuse a second stage that leaves the first one no token.

        Raises:
            ValueError: it names how many there are.
        """
        asked = self.critic_tokens
        if self.always and asked and asked + len(self.check) >= max_tokens:
            raise ValueError(
                f"tccf: critic_tokens {asked} and {len(self.check)} tokens of check "
                f"leave nothing of max_tokens {max_tokens} for the first stage; lower "
                "critic_tokens, raise max_tokens, or set always to false"
            )

    def most_thoughts(self, max_tokens: int) -> int:
        """How many tokens the first stage may write."""
        if not self.always:
            return max_tokens
        return max(max_tokens - len(self.check) - self._critic(max_tokens), 1)

    def most_tokens(self, written: int, max_tokens: int) -> int:
        """How many tokens the output may have once `written` are the first stage's."""
        if self.critic_tokens == 0:
            return max_tokens
        whole = written + len(self.check) + self._critic(max_tokens)
        return min(whole, max_tokens)

    def _critic(self, max_tokens: int) -> int:
        """Most tokens of the second stage."""
        if self.critic_tokens is None:
            return min(CRITIC_TOKENS, max_tokens // 2)
        return self.critic_tokens

    def first_stage(self, before: Sequence[int], new: Sequence[int]) -> int:
        """How many `new` tokens, which follow `before`, are in the first stage."""
        length = len(self.trigger)
        tokens = [*before[max(len(before) - length + 1, 0) :], *new]
        known = len(tokens) - len(new)
        for end in range(known + 1, len(tokens) + 1):
            if tuple(tokens[max(end - length, 0) : end]) == self.trigger:
                return end - known
        return len(new)

    def end_with(self, output: Sequence[int]) -> bool:
        """Whether an output's last token completes the trigger."""
        return tuple(output[-len(self.trigger) :]) == self.trigger


def one_at_a_time(config: RequestConfig) -> RequestConfig:
    """The options of the second stage, of a request with these."""
    return replace(
        config,
        block_length=1,
        attended_length=1,
        sub_block_length=1,
        steps=None,
        steps_per_block=None,
    )


def _token_ids(
    name: str, text: str | list[int], model_config: ModelConfig
) -> tuple[int, ...]:
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


def _checked(
    name: str, ids: tuple[int, ...], model_config: ModelConfig
) -> tuple[int, ...]:
    """Return the ids, if they are not too many and the model has such tokens."""
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
