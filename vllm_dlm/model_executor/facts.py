# SPDX-License-Identifier: Apache-2.0
"""EngineFacts and RequestFacts: what stays as it is while an engine, a request lives.

The engine's parts are given these and the request table (`slots.py`); they read no
configuration themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.config.compilation import CompilationMode

from vllm_dlm.config.carried import (
    AUTOMATA,
    CANVAS_END,
    PATTERN,
    THOUGHT,
    WATCHED,
    request_config,
)
from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.config.request import RequestConfig, resolve, server_config
from vllm_dlm.config.stop_ids import closing_ids, stop_ids
from vllm_dlm.config.tccf import SECOND_STAGE, one_at_a_time
from vllm_dlm.model_executor.layout import Limits, RequestLayout, lay_out
from vllm_dlm.model_executor.model_key import model_key
from vllm_dlm.model_executor.running_ahead import runs_ahead
from vllm_dlm.model_executor.sampling.logits import tile_rows
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import Context

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData


@dataclass(frozen=True)
class EngineFacts:
    """What is fixed when the engine starts: device, model, server options, limits."""

    device: torch.device
    model_config: ModelConfig
    """vLLM's."""
    model_key: str
    """A name for the model's weights (`model_key.py`)."""
    defaults: ModelDefaults
    """What the model's family declares."""
    server: DlmConfig
    """Options of the server."""
    additional_config: Mapping[str, Any]
    """vLLM's option of this name, where other packages' observers find theirs."""
    compiles: bool
    """Whether the network is compiled."""
    is_async: bool
    """Whether steps are scheduled before the outcome of the last one is known."""
    default_config: RequestConfig
    """How a request without options of its own is decoded."""
    max_canvas: int
    """Widest canvas of a model with full attention, in positions."""
    max_num_reqs: int
    """Requests that can be served at a time: slots are numbered below it."""
    max_num_tokens: int
    """Rows that a forward may have."""
    tile_rows: int
    """Rows that go through lm_head at a time."""
    soft_inputs: bool
    """Whether the engine makes input embeddings itself (`soft_inputs.py`)."""

    @classmethod
    def of(cls, vllm_config: VllmConfig, device: torch.device) -> EngineFacts:
        """Gather the facts of an engine.

        Raises:
            ValueError: options of the server are wrong.
        """
        model_config = vllm_config.model_config
        hf_config = model_config.hf_config
        server = server_config(vllm_config)
        defaults = ModelDefaults.from_hf_config(hf_config)
        max_canvas: int = hf_config.canvas_length
        soft_inputs = server.soft_inputs or defaults.soft_inputs
        rows = tile_rows(hf_config.vocab_size, model_config.dtype, device)
        return cls(
            device=device,
            model_config=model_config,
            model_key=model_key(model_config.model, model_config.revision, hf_config),
            defaults=defaults,
            server=server,
            additional_config=vllm_config.additional_config,
            compiles=vllm_config.compilation_config.mode != CompilationMode.NONE,
            is_async=bool(vllm_config.scheduler_config.async_scheduling),
            default_config=resolve(server, None, defaults).sized(
                max_canvas, max_canvas
            ),
            max_canvas=max_canvas,
            max_num_reqs=vllm_config.scheduler_config.max_num_seqs,
            max_num_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
            # A tile's probabilities take as much memory as its logits.
            tile_rows=max(rows // 2, 1) if soft_inputs else rows,
            soft_inputs=soft_inputs,
        )

    @property
    def mask_id(self) -> int:
        """The token id that stands for a mask."""
        return self.defaults.mask_token_id

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""
        size: int = self.model_config.get_vocab_size()
        return size

    @property
    def max_model_len(self) -> int:
        """Positions that a request can have.

        vLLM may lower it once more after the model is loaded, to what its KV cache
        holds.
        """
        length: int = self.model_config.max_model_len
        return length

    @property
    def limits(self) -> Limits:
        """What the server grants every request."""
        return Limits(self.max_canvas, self.max_model_len)

    @property
    def commits_alone(self) -> bool:
        """Whether a forward that ends before the active block only writes KV."""
        return self.server.commit == "separate" and not self.defaults.leads_blocks

    def context(self, cache: str) -> Context:
        """What strategies are told of the engine, for requests under one KV policy."""
        from vllm.distributed import get_tp_group

        return Context(
            device=self.device,
            model=self.model_config.model,
            model_key=self.model_key,
            attention=self.defaults.attention,
            cache=cache,
            own_block=self.defaults.own_block(self.server.block_length),
            options=self.server.strategy_options(),
            mask_id=self.mask_id,
            edit_tokens=self.defaults.edit_tokens,
            agreed=get_tp_group().broadcast_object,
        )


@dataclass(frozen=True)
class RequestFacts:
    """What is fixed when a request is admitted; on the host."""

    id: str
    config: RequestConfig
    """Its options, `sized`."""
    layout: RequestLayout
    params: SamplingParams
    seed: int
    """Of what is drawn for the request."""
    stop_ids: tuple[int, ...]
    """Token ids at which the scheduler ends this request, in order."""
    measures_drawn: bool
    """Whether statistics are those of the distribution that is drawn from."""
    runs_ahead: bool = False
    """Whether its forwards are planned before the outcome of the last one is there
    (`running_ahead.py`)."""
    closing_ids: frozenset[int] = frozenset()
    """Tokens that fill no hole of a canvas: they end a text, or pad it."""
    pattern: str | None = None
    """Regular expression that the text must match; None for any text."""
    canvas_end: int = 0
    """Of a request that returns after a preemption, if the scheduler says so: one past
    its canvas's last position. Else 0."""
    is_watched: bool = False
    """Whether each of its steps sends a frame (`frames.py`)."""

    @property
    def min_tokens(self) -> int:
        """Output positions at which the text must not end.

        Not left of what the request has written itself, unless its holes close.
        """
        canvas = self.layout.canvas
        if canvas is None:
            return int(self.params.min_tokens)
        if canvas.shrinks or canvas.is_elastic:
            return 0
        return max(self.params.min_tokens, canvas.pins_end)

    @classmethod
    def of(cls, new: NewRequestData, engine: EngineFacts) -> RequestFacts:
        """Gather the facts of a request that is new, or returns after a preemption."""
        params, known = new.sampling_params, new.prefill_token_ids
        prompt_len = new.prompt_len
        asked = dict(params.extra_args or {})
        in_second_stage = asked.pop(SECOND_STAGE, False)
        canvas_end = asked.pop(CANVAS_END, 0)
        pattern = asked.pop(PATTERN, None)
        asked.pop(THOUGHT, None)
        asked.pop(AUTOMATA, None)
        is_watched = asked.pop(WATCHED, None) is not None
        config = request_config(asked, engine.server, engine.defaults)
        config = config.sized(params.max_tokens, engine.max_canvas)
        if in_second_stage:
            config = one_at_a_time(config)
        layout = lay_out(
            config,
            engine.defaults,
            engine.limits,
            prompt_len=prompt_len,
            num_known=len(known),
            max_tokens=params.max_tokens,
        )
        # Unseeded requests still need one seed that all tensor-parallel ranks share.
        text = f"{engine.model_config.seed}:{new.req_id}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        own_seed = int.from_bytes(digest, "little") >> 1
        seed = params.seed
        if seed is None and engine.defaults.noise == "uniform":
            # The same request has the same text at temperature 0, noise or not.
            seed = 0 if params.temperature == 0 else None
        follows_reference = (
            config.reference_exact and engine.defaults.reference_confidence == "drawn"
        )
        return cls(
            id=new.req_id,
            config=config,
            layout=layout,
            params=params,
            seed=own_seed if seed is None else seed,
            stop_ids=tuple(sorted(stop_ids(params))),
            measures_drawn=follows_reference
            or layout.is_elastic
            or STRATEGIES[config.strategy].measures == "drawn",
            runs_ahead=engine.is_async
            and runs_ahead(config, params, engine.defaults, engine.server),
            closing_ids=closing_ids(
                params, engine.defaults, engine.model_config.hf_config
            ),
            canvas_end=canvas_end,
            pattern=pattern,
            is_watched=is_watched,
        )
