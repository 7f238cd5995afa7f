# SPDX-License-Identifier: Apache-2.0
"""Which requests can be decoded so that their text matches a pattern.

Candidates of such a text are one path through the pattern's automaton. A strategy may
write any part of the path, in any order; what writes anything else is refused here, by
name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_dlm.strategies import STRATEGIES

if TYPE_CHECKING:
    from vllm_dlm.config.request import RequestConfig


def why_unconstrained(config: RequestConfig) -> str | None:
    """Why a request's text cannot be held to a pattern, and what to do about it.

    Args:
        config: its options.

    Returns:
        The rest of a sentence that begins with what asks for the pattern, as
        "structured_outputs"; None where nothing forbids it.
    """
    if config.tccf is not None:
        return "cannot be combined with tccf, whose check text is no answer"
    if config.reference_exact:
        return (
            "cannot be combined with reference_exact: published loops write tokens "
            "that no pattern knows of"
        )
    canvas = config.canvas
    if canvas is not None and (canvas.shrinks or canvas.is_elastic):
        kind = "shrink" if canvas.shrinks else "elastic"
        return (
            f"cannot be combined with holes {kind!r}: what a pattern holds is the text "
            "with all of its holes; leave holes out"
        )
    rule = STRATEGIES[config.strategy]
    why = rule.why_unconstrained(config.params)
    if why is not None:
        able = ", ".join(constrained_strategies(rule.noise))
        return (
            f"does not work with the strategy {config.strategy!r} and these "
            f"parameters: {why}. Strategies of this model that can: {able or 'none'}"
        )
    return None


def constrained_strategies(noise: str = "mask") -> list[str]:
    """The strategies whose texts can be held to a pattern, with default parameters.

    Args:
        noise: what the model replaces (`Strategy.noise`).
    """
    found = []
    for name in STRATEGIES:
        rule = STRATEGIES[name]
        if rule.noise != noise:
            continue
        try:
            params = rule.Params()
        except ValueError:
            # It has parameters that must be set.
            params = rule.Params.model_construct()
        if rule.why_unconstrained(params) is None:
            found.append(name)
    return found
