# SPDX-License-Identifier: Apache-2.0
"""The token ids that end a request's text.

Those that a model declares are `ModelDefaults.stop_ids`; the scheduler adds them to
the request's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams


def stop_ids(params: SamplingParams) -> frozenset[int]:
    """Token ids at which the scheduler ends a request."""
    ids = set(params.stop_token_ids or ())
    # vLLM leaves this None under ignore_eos.
    if params.eos_token_id is not None:
        ids.add(params.eos_token_id)
    return frozenset(ids)
