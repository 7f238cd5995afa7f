# SPDX-License-Identifier: Apache-2.0
"""`vllm.LLM` with the dlm options as keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import vllm

from vllm_dlm.entrypoints.flags import FLAG_PREFIX, fold_options
from vllm_dlm.messages import unknown


class LLM(vllm.LLM):
    """`vllm.LLM` for diffusion language models.

    Args:
        model: a folder, a hub id, or an alias such as "llada-tiny".
        dlm_strategy: decoding strategy; `vllm-dlm strategies` lists them.
        dlm_strategy_config: the strategy's own parameters.
        dlm_block_length: positions decoded together, or "canvas", all.
        dlm_sub_block_length: positions of a block written at a time.
        dlm_cache: "none" (exact), "prefix", "dual", "vicinity" or "window".
        dlm_cache_config: the cache policy's own parameters.
        dlm_steps: denoise steps over a request's whole canvas.
        dlm_steps_per_block: the same per block.
        dlm_eotp: end-of-text prediction: "off", "block" or "token".
        dlm_eotp_threshold: least probability of an end that is not written yet.
        dlm_tccf: think coarse, critic fine: {"trigger": ..., "check": ...}.
        dlm_reference_exact: decode as the published reference code does.
        dlm_step_map: give every output its step map; `vllm_dlm.step_map` reads it.
        dlm_max_canvas: most positions of a canvas.
        dlm_commit: "fused", or "separate" to compare with it.
        dlm_online_learning: let strategies learn from finished requests.
        dlm_filter_dir: folder of learned filters.
        dlm_record_traces: keep confidences of finished requests in memory.
        dlm_trajectory_dir: folder for a log of every step of every request.
        additional_config: as in `vllm.LLM`; the options above go into its "dlm".
        **kwargs: everything else `vllm.LLM` takes.

    Raises:
        TypeError: an unknown `dlm_*` argument; the message lists the known ones.
        ValueError: a value that is not valid; the message says what is.
    """

    def __init__(
        self,
        model: str,
        *,
        dlm_strategy: str | None = None,
        dlm_strategy_config: Mapping[str, Any] | None = None,
        dlm_block_length: int | Literal["canvas"] | None = None,
        dlm_sub_block_length: int | None = None,
        dlm_cache: str | None = None,
        dlm_cache_config: Mapping[str, Any] | None = None,
        dlm_steps: int | None = None,
        dlm_steps_per_block: int | None = None,
        dlm_eotp: Literal["off", "block", "token"] | None = None,
        dlm_eotp_threshold: float | None = None,
        dlm_tccf: Mapping[str, Any] | None = None,
        dlm_reference_exact: bool | None = None,
        dlm_step_map: bool | None = None,
        dlm_max_canvas: int | None = None,
        dlm_commit: Literal["fused", "separate"] | None = None,
        dlm_online_learning: bool | None = None,
        dlm_filter_dir: str | None = None,
        dlm_record_traces: bool | None = None,
        dlm_trajectory_dir: str | None = None,
        additional_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        options = {
            "strategy": dlm_strategy,
            "strategy_config": dlm_strategy_config and dict(dlm_strategy_config),
            "block_length": dlm_block_length,
            "sub_block_length": dlm_sub_block_length,
            "cache": dlm_cache,
            "cache_config": dlm_cache_config and dict(dlm_cache_config),
            "steps": dlm_steps,
            "steps_per_block": dlm_steps_per_block,
            "eotp": dlm_eotp,
            "eotp_threshold": dlm_eotp_threshold,
            "tccf": dlm_tccf and dict(dlm_tccf),
            "reference_exact": dlm_reference_exact,
            "step_map": dlm_step_map,
            "max_canvas": dlm_max_canvas,
            "commit": dlm_commit,
            "online_learning": dlm_online_learning,
            "filter_dir": dlm_filter_dir,
            "record_traces": dlm_record_traces,
            "trajectory_dir": dlm_trajectory_dir,
        }
        for name in kwargs:
            if name.startswith(FLAG_PREFIX):
                valid = [FLAG_PREFIX + option for option in options]
                raise TypeError(f"LLM(): {unknown(name, valid)}")
        super().__init__(
            model,
            additional_config=fold_options(additional_config or {}, options),
            **kwargs,
        )
