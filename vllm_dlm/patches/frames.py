# SPDX-License-Identifier: Apache-2.0
"""Frames leave the way of an engine's outputs before vLLM reads these."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_dlm.entrypoints.frames import deliver
from vllm_dlm.patches.ledger import Where, patch

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput


@patch(
    "vllm.v1.engine.output_processor:OutputProcessor.process_outputs",
    why=(
        "A step that hands out no token has no output, and an output has no place for "
        "what a model says beside tokens. Made into a result, an output without tokens "
        "would count as a first token in the statistics, and merge with later ones."
    ),
    upstream="docs/upstream.md#a-step-without-tokens-has-no-way-to-the-client",
    drop_when="an output can carry what a plugin says of a step, also without tokens",
    where=Where.FRONT_END,
)
def process_outputs(
    original: Callable[..., OutputProcessorOutput],
) -> Callable[..., OutputProcessorOutput]:
    """Hands frames to whoever watches, and passes on the outputs that have more."""

    def process(
        self: OutputProcessor,
        engine_core_outputs: list[EngineCoreOutput],
        *args: Any,
        **kwargs: Any,
    ) -> OutputProcessorOutput:
        left = deliver(engine_core_outputs, self.request_states)
        return original(self, left, *args, **kwargs)

    return process
