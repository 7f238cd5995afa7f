# SPDX-License-Identifier: Apache-2.0
"""Two engines that can share a text: checked, sized and configured before they start.

The models must have one tokenizer. Both get the same context length, a share of the
memory, and a reserved token. By the key in `additional_config` each engine gets the
logits processor that ends turns (`front_end.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_dlm.config import aliases
from vllm_dlm.config.engine_keys import SWITCHING
from vllm_dlm.switching.entropy import LARGE, SMALL, Model

logger = init_logger(__name__)

MEMORY_SHARES: dict[Model, float] = {SMALL: 0.25, LARGE: 0.65}
"""`gpu_memory_utilization` of engines that are given no size: together what one engine
takes by default."""


@dataclass(frozen=True)
class Pair:
    """What two engines are started with."""

    engine_args: dict[Model, EngineArgs]
    stop_token_id: int
    """Ends a turn; no text contains it."""
    max_model_len: int


def plan_pair(
    models: Mapping[Model, str],
    options: Mapping[Model, Mapping[str, Any]],
    *,
    stop_token_id: int | None = None,
    args_class: type[EngineArgs] = EngineArgs,
) -> Pair:
    """Check two models and their options, and fill in what is left open.

    Args:
        models: folders, hub ids or aliases.
        options: of each engine: arguments of `vllm.EngineArgs`.
        stop_token_id: the reserved token; one is chosen without it.
        args_class: `EngineArgs`, or `AsyncEngineArgs` for a server.

    Raises:
        ValueError: options that are not valid, or models that do not fit together.
    """
    if os.environ.get("VLLM_DLM_DISABLE") == "1":
        raise ValueError(
            "VLLM_DLM_DISABLE=1 switches off the plugin, and with it what ends a "
            "model's turn: unset it"
        )
    args = {
        model: _engine_args(model, models[model], options[model], args_class)
        for model in (SMALL, LARGE)
    }
    configs = {model: each.create_model_config() for model, each in args.items()}
    for model, config in configs.items():
        if config.is_diffusion or config.runner_type != "generate":
            raise ValueError(
                f"the {model} model, {models[model]!r}, does not write token by token; "
                "a pair is of two autoregressive models"
            )
    tokenizers = {
        model: cached_tokenizer_from_config(config) for model, config in configs.items()
    }
    _check_tokenizers(models, tokenizers[SMALL], tokenizers[LARGE])
    shortest = min(config.max_model_len for config in configs.values())
    for each in args.values():
        each.max_model_len = shortest
    token_id = _reserved_token(
        tokenizers[LARGE],
        min(config.get_vocab_size() for config in configs.values()),
        {end for config in configs.values() for end in _end_tokens(config)},
        stop_token_id,
    )
    logger.info(
        "Two models, one text: small %s, large %s; context %d, reserved token %d",
        models[SMALL],
        models[LARGE],
        shortest,
        token_id,
    )
    return Pair(args, token_id, shortest)


def _engine_args(
    model: Model, name: str, options: Mapping[str, Any], args_class: type[EngineArgs]
) -> EngineArgs:
    if any(options.get(key) for key in ("speculative_config", "spec_method")):
        raise ValueError(
            f"the {model} engine is given speculative decoding, which does not go with "
            "logits processors on vLLM's model runner V1, and switching is one; remove "
            "`speculative_config`"
        )
    if options.get("skip_tokenizer_init"):
        raise ValueError("skip_tokenizer_init: a pair needs its tokenizers")
    options = dict(options)
    additional = {**(options.pop("additional_config", None) or {}), SWITCHING: model}
    defaults: dict[str, Any] = {"served_model_name": [name]}
    sized = ("gpu_memory_utilization", "kv_cache_memory_bytes")
    legacy_size = current_platform.is_cpu() and os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    # On a CPU, built-in models take what their requests can use (`cpu_memory.py`).
    folder = aliases.resolve(name, options.get("revision"))
    fits_itself = current_platform.is_cpu() and aliases.is_built_in(folder)
    is_sized = any(options.get(key) is not None for key in sized)
    if not legacy_size and not fits_itself and not is_sized:
        share = defaults["gpu_memory_utilization"] = MEMORY_SHARES[model]
        logger.info(
            "The %s engine gets %d %% of the memory; set %s in its options for another "
            "size",
            model,
            round(100 * share),
            " or ".join(sized),
        )
    try:
        return args_class(
            model=folder,
            additional_config=additional,
            **{**defaults, **options},
        )
    except TypeError as error:
        raise ValueError(
            f"options of the {model} engine: {error}; valid are the arguments of "
            "vllm.EngineArgs"
        ) from None


def _check_tokenizers(models: Mapping[Model, str], small: Any, large: Any) -> None:
    ours, theirs = small.get_vocab(), large.get_vocab()
    different = sorted(
        token
        for token in ours.keys() | theirs.keys()
        if ours.get(token) != theirs.get(token)
    )
    if different:
        raise ValueError(
            f"{models[SMALL]!r} and {models[LARGE]!r} have different tokenizers: "
            f"{len(ours)} and {len(theirs)} tokens, {len(different)} of them not the "
            f"same, such as {different[0]!r}. Both models must share one: take two "
            "sizes of one family"
        )


def _end_tokens(model_config: Any) -> set[int]:
    """Ids that end a text of this model."""
    ends: set[int] = set()
    generation = model_config.try_get_generation_config()
    hf_config = model_config.hf_text_config
    for value in (generation.get("eos_token_id"), hf_config.eos_token_id):
        ends.update([value] if isinstance(value, int) else value or ())
    return ends


def _reserved_token(
    tokenizer: Any, vocab_size: int, end_ids: set[int], wanted: int | None
) -> int:
    """A token that no text needs, of which both models have a logit.

    Without a wish: the last id that stands for no token (most vocabularies are padded),
    else a special token that is only ever in a prompt or in training: mask, padding,
    begin of text.
    """
    end_ids = end_ids | {tokenizer.eos_token_id}
    if wanted is not None:
        is_id = isinstance(wanted, int) and not isinstance(wanted, bool)
        if not is_id or not 0 <= wanted < vocab_size:
            raise ValueError(
                f"stop_token_id {wanted!r} is not in the models' vocabulary: ids go "
                f"from 0 to {vocab_size - 1}"
            )
        if wanted in end_ids:
            raise ValueError(
                f"stop_token_id {wanted} ends a text already; take another token that "
                "no text needs"
            )
        return wanted
    used = set(tokenizer.get_vocab().values())
    for token_id in range(vocab_size - 1, -1, -1):
        if token_id not in used:
            return token_id
    for name in ("mask_token_id", "pad_token_id", "bos_token_id"):
        special: int | None = getattr(tokenizer, name, None)
        if special is not None and special < vocab_size and special not in end_ids:
            return special
    raise ValueError(
        "every id of the vocabulary is a token that a text may need; name one that "
        "yours do not need as stop_token_id"
    )
