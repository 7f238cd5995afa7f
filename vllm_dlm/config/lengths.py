# SPDX-License-Identifier: Apache-2.0
"""Lengths of a request's decoding: of its blocks, of its step schedule, of its text.

Parts of `resolve` (`request.py`): whose option counts, and what would be ignored.
"""

from __future__ import annotations

from collections.abc import Mapping

from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.options import DlmConfig, EndOfText
from vllm_dlm.config.request_options import RequestOptions
from vllm_dlm.messages import OptionError, with_parameters
from vllm_dlm.option_types import WHOLE_CANVAS
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import Params

BLOCKS_TOGETHER = 4
"""Blocks of a block-causal model that are decided together, by a strategy that can,
where the request does not say how many."""


def first_set(option: str, asked: RequestOptions, server: DlmConfig) -> DlmConfig:
    """Whose value of an option counts: the request's, if it has set it."""
    return asked.options if asked.has(option) else server


def end_of_text(
    asked: RequestOptions, server: DlmConfig, strategy: str
) -> tuple[EndOfText, float]:
    """The options `eotp` and `eotp_threshold`.

    Raises:
        ValueError: a request sets a threshold that nothing would look at.
    """
    eotp = asked.options.eotp or server.eotp or STRATEGIES[strategy].eotp
    # A request that says `off` itself is not misunderstood.
    if asked.has("eotp_threshold") and not asked.options.eotp and eotp == "off":
        set_as = asked.names["eotp_threshold"]
        raise OptionError(
            f"{set_as} would be ignored: eotp is 'off'; set it to "
            "'block', 'token' or 'canvas', or leave the threshold out",
            set_as,
        )
    return eotp, first_set("eotp_threshold", asked, server).eotp_threshold


def steps_of(
    asked: RequestOptions, server: DlmConfig, strategy: str, params: Params
) -> tuple[int | None, int | None]:
    """The options of the step schedule, `steps` and `steps_per_block`.

    A server's are for all its strategies that follow a schedule.

    Raises:
        ValueError: the request sets one for a strategy that follows none.
    """
    names = ("steps", "steps_per_block")
    own = [name for name in names if asked.has(name)]
    if STRATEGIES[strategy].follows_schedule(params):
        source = asked.options if own else server
        return source.steps, source.steps_per_block
    if own:
        set_as = asked.names[own[0]]
        raise OptionError(
            f"{set_as} would be ignored: the strategy {strategy!r} follows "
            f"no step schedule. Those that do: {', '.join(scheduled_strategies())}",
            set_as,
        )
    return None, None


def scheduled_strategies() -> list[str]:
    """The strategies that follow the step schedule, and with which parameters."""
    found = []
    for name in STRATEGIES:
        schedule = STRATEGIES[name].schedule
        if isinstance(schedule, Mapping):
            found.append(f"{name} with {with_parameters(schedule)}")
        elif schedule:
            found.append(name)
    return found


def block_length_of(
    asked: RequestOptions, server: DlmConfig, defaults: ModelDefaults, strategy: str
) -> int:
    """Positions of a block; 0 for the whole canvas."""
    length = asked.options.block_length or _usual_length(strategy, server, defaults)
    return 0 if length == WHOLE_CANVAS else int(length)


def _usual_length(
    strategy: str, server: DlmConfig, defaults: ModelDefaults
) -> int | str:
    """The block length of a request that does not say one."""
    length = server.block_length or defaults.block_length
    if STRATEGIES[strategy].scope == "block":
        return length
    if not defaults.reuses_blocks:
        # A length that the server was given for another strategy says nothing here.
        own = server.block_length if server.strategy == strategy else None
        return own or WHOLE_CANVAS
    if STRATEGIES[strategy].scope == "blocks" and length != WHOLE_CANVAS:
        return BLOCKS_TOGETHER * int(length)
    return length
