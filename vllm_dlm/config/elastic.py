# SPDX-License-Identifier: Apache-2.0
"""Elastic holes: how a request with one is decoded, and what it cannot ask for.

The loop is DreamOn's (arXiv 2602.01326): in each step the most confident masks of the
hole are written; an end of text takes its position away, the token that widens becomes
two masks, and what is to the right moves. `sampling/moving.py` carries it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm_dlm.messages import OptionError
from vllm_dlm.option_types import WHOLE_CANVAS

if TYPE_CHECKING:
    from vllm_dlm.config.model import ModelDefaults
    from vllm_dlm.config.options import DlmConfig
    from vllm_dlm.config.request_options import RequestOptions

INITIAL = 4
"""Masks that a hole begins with: as in the published examples."""

STRATEGIES = ("static", "threshold", "factor", "eb", "entropy")
"""Those that decide by the masks of this step alone: nothing that they know belongs to
a position, which may have moved, or counts on a number of steps."""

AS_PUBLISHED = {
    "strategy": "static",
    "strategy_config": {"mode": "entropy"},
    "block_length": WHOLE_CANVAS,
    "sub_block_length": None,
    "cache": "none",
    "cache_config": {},
    "steps": None,
    "steps_per_block": None,
    "eotp": "off",
    "growth": "none",
    "growth_config": {},
}
"""What counts for these requests in place of the server's defaults."""

_ONE_BLOCK = "an elastic hole is in one block, which ends when it has no mask"
_NO_STEPS = "an elastic hole has no number of steps: it ends when it has no mask"

FIXED = {
    "block_length": _ONE_BLOCK,
    "sub_block_length": _ONE_BLOCK,
    "steps": _NO_STEPS,
    "steps_per_block": _NO_STEPS,
}
"""Options that a request cannot set, and why."""


def as_published(
    asked: RequestOptions, server: DlmConfig, defaults: ModelDefaults
) -> DlmConfig:
    """The server's options, for a request with an elastic hole.

    Raises:
        OptionError: the model has none, or the request sets what it cannot.
    """
    set_as = asked.names["holes"]
    if defaults.reuses_blocks or defaults.expand_token is None:
        why = (
            "decodes block after block, and does not see what is behind the hole"
            if defaults.reuses_blocks
            else "does not ask for places: its config.json has no expand_token_id"
        )
        raise OptionError(
            f"{set_as} 'elastic' is for models as DreamOn, and this one {why}; use "
            "'exact' or 'shrink'",
            set_as,
        )
    for option, why in FIXED.items():
        if asked.has(option):
            name = asked.names[option]
            raise OptionError(f"{name}: {why}; leave it out", name)
    for option, only in (("cache", "none"), ("eotp", "off")):
        if asked.has(option) and getattr(asked.options, option) not in (None, only):
            name = asked.names[option]
            raise OptionError(
                f"{name}: the text of an elastic hole moves in each step, and only "
                f"{only!r} is right there; leave it out",
                name,
            )
    strategy = asked.options.strategy
    if strategy is not None and strategy not in STRATEGIES:
        name = asked.names["strategy"]
        raise OptionError(
            f"{name} {strategy!r} remembers positions or counts steps, and in an "
            f"elastic hole both move; use one of {', '.join(STRATEGIES)}",
            name,
        )
    return server.model_copy(update=AS_PUBLISHED)


def check_elastic(
    asked: RequestOptions, server: DlmConfig, combined: Mapping[str, bool]
) -> None:
    """Refuse what is kept by position, or would be told by it.

    Args:
        combined: option -> whether it is on, of those of the request or the server
            that cannot be; beside `pinned`.

    Raises:
        OptionError: it names the remedy.
    """
    for option, is_on in {**combined, "pinned": asked.canvas.pinned is False}.items():
        if is_on:
            name = asked.names[option]
            raise OptionError(
                f"{asked.names['holes']} 'elastic' cannot be combined with {name}: "
                "tokens have no place of their own until the hole is filled; leave it "
                "out (or set it to what is off)",
                name,
            )
    logs = "trajectory-dir" if server.trajectory_dir else "record-traces"
    if server.trajectory_dir or server.record_traces:
        name = asked.names["holes"]
        raise OptionError(
            f"{name} 'elastic' is refused by a server with --dlm-{logs}, which notes "
            "what is written at each position; use 'exact' or 'shrink'",
            name,
        )
