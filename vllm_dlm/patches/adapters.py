# SPDX-License-Identifier: Apache-2.0
"""Adapters (LoRA): what is loaded at run time, and whose KV a page holds."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from vllm_dlm.messages import bounded
from vllm_dlm.patches.ledger import Where, patch

if TYPE_CHECKING:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.v1.request import Request


@patch(
    "vllm.v1.core.kv_cache_utils:_gen_lora_extra_hash_keys",
    why=(
        "A page is found by an adapter's name and path. An adapter that was unloaded, "
        "trained on and loaded again from the same folder would be given keys and "
        "values of the old one."
    ),
    upstream="docs/upstream.md#an-adapter-finds-pages-of-the-one-before-it",
    drop_when="an adapter's number, which is new with each loading, is in the hash",
    mends_vllm=True,
)
def pages_of_one_loading(
    original: Callable[[Request], list[Any]],
) -> Callable[[Request], list[Any]]:
    """Adds the adapter's number, for every model."""

    def keys(request: Request) -> list[Any]:
        found = original(request)
        if found:
            assert request.lora_request is not None
            found.append(("lora_id", str(request.lora_request.lora_int_id)))
        return found

    return keys


@patch(
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.load_lora_adapter",
    why=(
        "An adapter that does not fit is reported as a fault of the server. With "
        "load_inplace vLLM reads the folder anew in each step, and texts that are "
        "being written go on with other weights than those that their keys are of."
    ),
    upstream="docs/upstream.md#an-adapter-is-loaded-in-place-in-every-step",
    drop_when="vLLM tells adapters that do not fit from faults, and loads one once",
    where=Where.SERVER,
    mends_vllm=True,
)
def load_lora_adapter(
    original: Callable[..., Awaitable[Any]],
) -> Callable[..., Awaitable[Any]]:
    """For our models a 400 with what does not fit, and for load_inplace."""

    async def load(
        self: OpenAIServingModels, request: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from vllm.entrypoints.serve import create_error_response
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse

        from vllm_dlm.admission.sampling_params import is_ours

        if not is_ours(self.model_config.hf_config):
            return await original(self, request, *args, **kwargs)
        if request.load_inplace:
            return create_error_response(
                "load_inplace is not supported for diffusion language models: texts "
                "that are being written would go on with another adapter; unload the "
                "adapter and load it again, or load the new one by another name"
            )
        reply = await original(self, request, *args, **kwargs)
        if isinstance(reply, ErrorResponse) and reply.error.code == 500:
            return create_error_response(_what_does_not_fit(reply.error.message))
        return reply

    return load


def _what_does_not_fit(message: str) -> str:
    """A worker's reason, without the path that it has taken; and what would fit."""
    found = re.search(
        r"failed with error '(.*)', please check the stack", message, re.S
    )
    return bounded(
        f"lora_path: {found[1] if found else message}. Diffusion language models take "
        "adapters of their layers' matrices, up to the server's --max-lora-rank; merge "
        "others into the weights"
    )
