# SPDX-License-Identifier: Apache-2.0
"""Which requests run ahead: the rule of asynchronous scheduling, for both processes.

With asynchronous scheduling a forward is scheduled and launched before the outcome of
the one before it is known. A request **runs ahead** if its rows can be guessed then:

    full attention, cache `none`     the same rows again: prompt and canvas
    block or causal attention        the same rows again: the active block. If the step
                                     before has finished it, they write its final KV,
                                     or predict the next block's lead

Scheduler and device both compare the guess with what they find: the scheduler when the
outcome is there (`CanvasRequest.is_void`), the device before it decides
(`planning/guesses.py`). If a guess was wrong the forward is **void**: it decides
nothing, and the next one makes up for it. A text never depends on a guess.

All other requests of an asynchronous engine sit out the step that is scheduled while a
forward of theirs is on its way: what comes next for them needs the host. So do those
that decide positions behind the active block too (`freedave` with `eager`,
`linear_spec`): how far they come with a step is not known before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_dlm.config.cache import FAR
from vllm_dlm.config.carried import PATTERN
from vllm_dlm.config.stop_ids import stop_ids
from vllm_dlm.model_executor.columns import STOP_IDS
from vllm_dlm.strategies import STRATEGIES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.sampling_params import SamplingParams

    from vllm_dlm.config.model import ModelDefaults
    from vllm_dlm.config.options import DlmConfig
    from vllm_dlm.config.request import RequestConfig

NEED_HOST = frozenset({"branches", "probabilities"})
"""Needs of strategies that the host serves between two steps."""


OWN_OBSERVERS = frozenset({"learn2pd", "trajectory_log"})
"""Observers of this package. What another one looks at is not known."""


def repeats_rows(config: RequestConfig, defaults: ModelDefaults) -> bool:
    """Whether each step of a block computes the same rows.

    Args:
        config: a request's options, `sized`.
    """
    reach = config.reach(defaults.shift)
    if defaults.reuses_blocks:
        length = config.block_length
        is_whole = config.attended_length == config.window == length
        return bool(reach.part >= length) and is_whole
    return bool(reach.refresh_every == 1 and reach.refresh_right >= FAR)


def why_not_ahead(
    plain: RequestConfig,
    defaults: ModelDefaults,
    server: DlmConfig,
    observers: Iterable[str] = (),
) -> str | None:
    """Why no request of a server would run ahead unless it has options of its own.

    Args:
        plain: options of a request without any, `sized`.
        server: the server's options.
        observers: names of those that are installed.

    Returns:
        What forbids it, and what to do about it; None if nothing does.
    """
    needs = sorted(STRATEGIES[plain.strategy].needs_with(plain.params) & NEED_HOST)
    foreign = sorted(set(observers) - OWN_OBSERVERS)
    if needs:
        return (
            f"the strategy {plain.strategy!r}, whose {needs[0]} are made on the host: "
            "choose another with --dlm-strategy"
        )
    if not repeats_rows(plain, defaults):
        return (
            f"the cache policy {plain.cache!r}, whose rows move from step to step: set "
            "--dlm-cache none"
        )
    if defaults.edit_tokens is not None:
        return "a model that inserts and deletes tokens: choose another model"
    if defaults.expand_token is not None:
        return "a model with a token that is no text: choose another model"
    if server.trajectory_dir is not None or server.record_traces:
        option = "record-traces" if server.record_traces else "trajectory-dir"
        return f"--dlm-{option}, for which each step is looked at: leave that out"
    if foreign:
        return f"the observer {foreign[0]!r}: uninstall the package that brings it"
    if is_observed(plain, server):
        return "online learning: pass --no-dlm-online-learning"
    asked = {
        "tccf": plain.tccf,
        "step-map": plain.step_map,
        "reference-exact": plain.reference_exact,
        "growth": plain.growth != "none",
        "eotp canvas": plain.eotp == "canvas",
    }
    for option, is_on in asked.items():
        if is_on:
            return f"--dlm-{option}: leave that to requests"
    return None


def runs_ahead(
    config: RequestConfig,
    params: SamplingParams,
    defaults: ModelDefaults,
    server: DlmConfig,
) -> bool:
    """Whether a request of an asynchronous engine runs ahead.

    Args:
        config: its options, `sized`; with `tccf`, of either stage.
        params: its sampling parameters; stop ids of the model among them.
        server: the server's options.
    """
    strategy = STRATEGIES[config.strategy]
    return (
        repeats_rows(config, defaults)
        and defaults.edit_tokens is None
        and defaults.expand_token is None
        and not strategy.needs_with(config.params) & NEED_HOST
        and not is_observed(config, server)
        and config.tccf is None
        and config.canvas is None
        and config.eotp != "canvas"
        and config.growth == "none"
        and not config.step_map
        and not config.reference_exact
        and params.num_logprobs is None
        and not restricts_tokens(params)
        # Paths through a pattern's automaton are found on the host (`constrained.py`).
        and PATTERN not in (params.extra_args or {})
        and len(stop_ids(params)) <= STOP_IDS
    )


def is_observed(config: RequestConfig, server: DlmConfig) -> bool:
    """Whether an observer of this package may follow a request."""
    return (
        server.record_traces
        or server.trajectory_dir is not None
        or (server.online_learning and config.strategy == "learn2pd")
    )


def restricts_tokens(params: SamplingParams) -> bool:
    """Whether sampling parameters favour or forbid tokens (`sampling/restrictions.py`).

    What they do may depend on the text so far, which is then looked up on the host.
    """
    return bool(
        params.min_tokens
        or params.logit_bias
        or params.allowed_token_ids
        or params.bad_words
    )


def loses_nothing(
    config: RequestConfig, defaults: ModelDefaults, server: DlmConfig
) -> bool:
    """Whether no forward of a request that runs ahead is computed in vain.

    In `block` models a finished block's KV takes a forward of its own, unless a lead
    is predicted by it, or the step that finishes a block is known before.
    """
    if not repeats_rows(config, defaults):
        return False
    return (
        not defaults.reuses_blocks
        or defaults.leads_blocks
        or ends_by_count(config)
        or server.async_blocks == 2
    )


def ends_by_count(config: RequestConfig) -> bool:
    """Whether it is known how many steps a block takes."""
    rule = STRATEGIES[config.strategy]
    return (
        rule.counts_out
        and rule.follows_schedule(config.params)
        and config.sub_block_length == config.block_length
    )
