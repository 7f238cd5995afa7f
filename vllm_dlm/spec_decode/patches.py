# SPDX-License-Identifier: Apache-2.0
"""Entries of the patch ledger for speculative decoding; found by name, as a theme."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_dlm.patches.ledger import patch

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig
    from vllm.sampling_params import SamplingParams


@patch(
    "vllm.sampling_params:SamplingParams._validate_spec_decode",
    why="A request's own draft limit would be read by the worker only.",
    upstream="docs/upstream.md#a-plugin-cannot-verify-sampling-parameters",
    drop_when="vLLM has a parameter for it",
)
def validate_spec_decode(original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses a limit that is no number, too large, or without speculation."""
    from vllm_dlm.spec_decode.front_end import check_request

    def validate(
        self: SamplingParams, speculative_config: SpeculativeConfig | None
    ) -> None:
        check_request(self, speculative_config)
        original(self, speculative_config)

    return validate
