# SPDX-License-Identifier: Apache-2.0
"""What a step is to each kind of model, and where going on from one is exact.

- An autoregressive model goes on from any token.
- A block-causal model goes on from the end of a block: finished blocks are final.
- A model with full attention does so too, if what it computes is the same row of
  prompt, text and masks: the canvas must end where it would have ended.

Where a step would be something else than a part of the whole text, it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.config.request import RequestConfig, resolve
from vllm_dlm.config.request_options import read_request
from vllm_dlm.model_executor.layout import canvas_width, steps_per_block
from vllm_dlm.search.base import Step, Text
from vllm_dlm.search.jobs import Plan
from vllm_dlm.strategies import STRATEGIES

WHOLE = "write whole texts: best_of_n or vote"


class TokenPace:
    """Of an autoregressive model."""

    def plan(self, text: Text, until: Step, max_tokens: int) -> Plan:
        """See `Pace`."""
        if until.blocks is not None:
            raise ValueError(
                "a step of blocks is for diffusion models, and this one writes token "
                "by token: name tokens or a stop string"
            )
        room = max_tokens - len(text.written)
        return Plan(min(until.tokens or room, room), stop=until.stop)


class UnknownPace:
    """Of a diffusion model behind an endpoint, which does not tell its blocks."""

    def plan(self, text: Text, until: Step, max_tokens: int) -> Plan:
        """See `Pace`."""
        raise ValueError(
            "an endpoint does not tell where the blocks of its diffusion model end: "
            f"search offline, with vllm_dlm.LLM, or {WHOLE}"
        )


class BlockPace:
    """Of a diffusion model.

    Args:
        server: the engine's options.
        extra_args: `SamplingParams.extra_args` of every request.
        defaults: what the model declares.
        max_model_len: of the engine.
    """

    def __init__(
        self,
        server: DlmConfig,
        extra_args: Mapping[str, Any] | None,
        defaults: ModelDefaults,
        max_model_len: int,
    ) -> None:
        self.server = server
        self.extra_args = dict(extra_args or {})
        self.defaults = defaults
        self.max_canvas = server.canvas_limit(max_model_len, defaults.max_canvas)

    def resolve(self, options: Mapping[str, Any]) -> RequestConfig:
        """How a request with these `dlm` options is decoded.

        Raises:
            ValueError: it is not.
        """
        return resolve(
            self.server, with_options(self.extra_args, options), self.defaults
        )

    def plan(self, text: Text, until: Step, max_tokens: int) -> Plan:
        """See `Pace`."""
        if until.blocks is None:
            raise ValueError(
                "a diffusion model writes whole blocks: a step is a number of blocks"
            )
        config = self.resolve({}).sized(max_tokens, self.max_canvas)
        self._check(config, max_tokens)
        length = config.attended_length
        position = len(text.prompt) + len(text.written)
        origin = self.defaults.origin(len(text.prompt), length)
        end = origin + ((position - origin) // length + until.blocks) * length
        room = max_tokens - len(text.written)
        count = min(end - position, room)
        options = None
        if config.steps is not None:
            # The engine's own, which it would spread over what is left of the canvas.
            width = canvas_width(max_tokens, length, self.max_canvas)
            options = {"steps_per_block": steps_per_block(config.steps, width, length)}
        if self.defaults.reuses_blocks:
            return Plan(count, options=options)
        return Plan(room, keep=count, options=options)

    def _check(self, config: RequestConfig, max_tokens: int) -> None:
        """Refuse what looks beyond a block.

        Raises:
            ValueError: what, and what to do about it.
        """
        strategy = STRATEGIES[config.strategy]
        is_full = not self.defaults.reuses_blocks
        edits = strategy.may_rewrite or getattr(config.params, "edit", False)
        wide = max_tokens > canvas_width(
            max_tokens, config.block_length, self.max_canvas
        )
        reason = None
        if read_request(self.extra_args).has("steps"):
            reason = "steps are spread over a whole canvas: set steps_per_block"
        elif config.tccf is not None:
            reason = "tccf looks at the whole text: leave it out"
        elif strategy.scope != "block":
            reason = f"the strategy {config.strategy!r} decides more than a block"
        elif edits:
            reason = f"the strategy {config.strategy!r} edits what it wrote"
        elif is_full and config.cache != "none":
            reason = f"cache {config.cache!r} would refresh elsewhere: set it to 'none'"
        elif is_full and config.eotp != "off":
            reason = "end-of-text prediction drops blocks: set eotp to 'off'"
        elif is_full and config.growth != "none":
            reason = "its canvas grows: set growth to 'none'"
        elif is_full and wide:
            reason = (
                f"{max_tokens} tokens take more than one canvas (of {self.max_canvas} "
                "positions): lower max_tokens"
            )
        if reason is not None:
            raise ValueError(
                f"block by block, this model would write another text: {reason}; or "
                f"{WHOLE}"
            )


def with_options(
    extra_args: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """A request's `extra_args` with further `dlm` options over its own."""
    if not options:
        return dict(extra_args)
    own = extra_args.get("dlm") or {}
    own = json.loads(own) if isinstance(own, str) else own
    flat = {f"dlm_{name}" for name in options}
    rest = {key: value for key, value in extra_args.items() if key not in flat}
    return {**rest, "dlm": {**own, **options}}
