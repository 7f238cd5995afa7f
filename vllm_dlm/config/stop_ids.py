# SPDX-License-Identifier: Apache-2.0
"""The token ids that end a request's text.

Those that a model declares are `ModelDefaults.stop_ids`; the scheduler adds them to
the request's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_dlm.config.model import as_ids

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.sampling_params import SamplingParams

    from vllm_dlm.config.model import ModelDefaults


def stop_ids(params: SamplingParams) -> frozenset[int]:
    """Token ids at which the scheduler ends a request."""
    ids = set(params.stop_token_ids or ())
    # vLLM leaves this None under ignore_eos.
    if params.eos_token_id is not None:
        ids.add(params.eos_token_id)
    return frozenset(ids)


def closing_ids(
    params: SamplingParams, model: ModelDefaults, hf_config: PretrainedConfig
) -> frozenset[int]:
    """Token ids that fill no hole of a canvas: ends of text, and padding.

    Args:
        params: of the request.
        model: what the model declares.
        hf_config: of the model; its `pad_token_id` is read.
    """
    pads = as_ids(getattr(hf_config, "pad_token_id", None))
    return stop_ids(params) | {*params.all_stop_token_ids, *model.stop_ids, *pads}
