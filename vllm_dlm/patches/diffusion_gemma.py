# SPDX-License-Identifier: Apache-2.0
"""vLLM's own DiffusionGemma computes what the published model computes.

Two things are mended where vLLM serves the model by its own code, unless the server is
started with `--dlm-diffusion-gemma stock`: a finished canvas is read as text, and rows
of text and of a canvas have their own layer scalars. The symmetric window of a canvas
stays; `docs/models.md` says what that means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_dlm.patches.ledger import Where, apply, entries, patch

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

_MODULE = "vllm.model_executor.models.diffusion_gemma"
_COMMIT = "docs/upstream.md#a-finished-canvas-of-diffusiongemma-is-not-read-as-text"
_SCALARS = "docs/upstream.md#diffusiongemma-has-two-scalars-for-each-layer"


def is_stock(vllm_config: VllmConfig) -> bool:
    """Whether the server asked for vLLM's DiffusionGemma as it is."""
    own = vllm_config.additional_config
    options = own.get("dlm") if isinstance(own, Mapping) else None
    return (options or {}).get("diffusion_gemma") == "stock"


@patch(
    "vllm.model_executor.models.registry:_LazyRegisteredModel.load_model_cls",
    why=(
        "The module of a model is imported where the model is loaded: importing "
        "DiffusionGemma's earlier, to mend it, would cost every engine seconds."
    ),
    upstream=_COMMIT,
    drop_when="the entries below are gone",
    mends_vllm=True,
)
def load_model_cls(original: Callable[..., Any]) -> Callable[..., Any]:
    """Puts the entries below in force where that model's class is imported."""

    def load(self: Any) -> Any:
        cls = original(self)
        if self.module_name == _MODULE:
            apply(entries(__name__, Where.MODEL))
        return cls

    return load


@patch(
    f"{_MODULE}:DiffusionGemmaModelState.prepare_inputs",
    why=(
        "The forward that writes a finished canvas' keys and values reads it through "
        "the self-conditioning module, which normalises its embeddings; a prompt's "
        "are read as they are. All later canvases attend to these keys."
    ),
    upstream=_COMMIT,
    drop_when="a committing request skips the self-conditioning module",
    where=Where.MODEL,
    mends_vllm=True,
)
def prepare_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    """Rows of requests that commit are embedded as text; nothing waits for the device.
    Says which rows are of a canvas, for the layers' scalars."""

    def prepare(self: Any, input_batch: Any, req_states: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = original(self, input_batch, req_states)
        if not self._req_id_to_index or is_stock(self.vllm_config):
            return inputs
        is_text = _text_rows(self, input_batch)
        if (is_canvas := getattr(self.model, "dlm_is_canvas", None)) is not None:
            is_canvas[: len(is_text), 0] = ~is_text
        if input_batch.num_draft_tokens > 0:
            _embed_as_text(self, input_batch, is_text, inputs["inputs_embeds"])
        return inputs

    return prepare


def _text_rows(state: Any, input_batch: Any) -> torch.Tensor:
    """[n] bool: rows of prompts, and of canvases that become text in this forward."""
    count = input_batch.num_reqs
    is_text = state.diffusion_states.is_encoder_phase[input_batch.idx_mapping[:count]]
    starts = input_batch.query_start_loc[: count + 1]
    rows: torch.Tensor = is_text.repeat_interleave(
        starts.diff(), output_size=input_batch.num_tokens
    )
    return rows


def _embed_as_text(
    state: Any, input_batch: Any, is_text: torch.Tensor, embeds: torch.Tensor
) -> None:
    """Embed anew, in place, rows of requests that commit.

    Args:
        is_text: [n] bool. Rows of prompts among them stay: they may be of an image.
        embeds: [at least n, H].
    """
    import torch
    from vllm.utils.torch_utils import async_tensor_h2d

    count = input_batch.num_reqs
    has_canvas = np.diff(input_batch.cu_num_logits_np[: count + 1]) > 0
    rows = np.diff(input_batch.query_start_loc_np[: count + 1])
    commits = is_text & async_tensor_h2d(
        np.repeat(has_canvas, rows), device=is_text.device
    )
    embeds = embeds[: len(commits)]
    text = state.model.embed_input_ids(input_batch.input_ids[: len(commits)])
    embeds.copy_(torch.where(commits[:, None], text, embeds))


@patch(
    f"{_MODULE}:DiffusionGemmaForConditionalGeneration.load_weights",
    why=(
        "A checkpoint has a layer scalar for rows of text and one for rows of a "
        "canvas; both are loaded into one buffer, and the last one stays for all rows."
    ),
    upstream=_SCALARS,
    drop_when="vLLM's layers keep both scalars",
    where=Where.MODEL,
    mends_vllm=True,
)
def load_weights(original: Callable[..., set[str]]) -> Callable[..., set[str]]:
    """Where a layer's two scalars differ, each row is multiplied by its own."""

    def load(self: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        import torch
        from vllm.config import get_current_vllm_config_or_none
        from vllm.logger import init_logger

        from vllm_dlm.model_executor.models.layer_scalars import LayerScalars

        config = get_current_vllm_config_or_none()
        if config is None or is_stock(config):
            # Weights that come later find the layers as the first ones left them.
            return original(self, weights)
        scalars = LayerScalars()
        loaded = original(self, scalars.noted(weights))
        is_canvas = getattr(self, "dlm_is_canvas", None)
        if (unequal := scalars.unequal()) and is_canvas is None:
            rows = config.scheduler_config.max_num_batched_tokens
            like = self.model.layers[0].layer_scalar
            is_canvas = like.new_zeros((rows, 1), dtype=torch.bool)
            self.dlm_is_canvas = is_canvas
            # A part of the key by which vLLM finds a compiled forward again.
            config.model_config.hf_config.dlm_layer_scalars = unequal
            init_logger(__name__).info(
                "DiffusionGemma: text and canvas have scalars of their own in %d of "
                "%d layers.",
                len(unequal),
                len(self.model.layers),
            )
        if is_canvas is not None:
            scalars.install(self.model.layers, is_canvas)
        return loaded

    return load
