# SPDX-License-Identifier: Apache-2.0
"""The options of a request, which begin with `dlm`: read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from vllm_dlm.admission.canvases import CanvasReader
from vllm_dlm.admission.handover import note, noted
from vllm_dlm.admission.stray_options import refuse_unread
from vllm_dlm.config.carried import to_plain
from vllm_dlm.config.model import ModelDefaults, edit_tokens_of
from vllm_dlm.config.options import LONGEST_REQUEST_BLOCK, DlmConfig, served_config
from vllm_dlm.config.request import RequestConfig, resolve
from vllm_dlm.config.request_options import own_options
from vllm_dlm.config.tccf import Stages
from vllm_dlm.messages import OptionError, quote
from vllm_dlm.option_types import WHOLE_CANVAS
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import Context

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.sampling_params import SamplingParams

DIFFUSION_GEMMA = "diffusion_"
"""Prefix of the `extra_args` keys of vLLM's own diffusion model."""


def read_options(params: SamplingParams, model_config: ModelConfig) -> RequestConfig:
    """Read a request's options, and check them against the model and the server.

    They are read once, and checked as often as the request is looked at.

    Returns:
        How the request will be decoded, `sized`.

    Raises:
        ValueError: an option is not valid, or not for this model or server.
    """
    server = served_config(model_config.hf_config)
    defaults = ModelDefaults.from_hf_config(model_config.hf_config)
    canvas = server.canvas_limit(model_config.max_model_len, defaults.max_canvas)
    config = noted(params)
    if config is None:
        refuse_unread_options(params.extra_args or {})
        reader = CanvasReader(params, model_config, canvas)
        config = resolve(server, params.extra_args, defaults, reader)
        if config.canvas is not None and to_plain(config) is None:
            raise ValueError(
                f"parameters of the strategy {config.strategy!r} are no plain data, "
                "and a canvas cannot travel with them: choose another strategy"
            )
        note(params, config)
    # A request without max_tokens takes what the context leaves: a whole canvas.
    config = config.sized(params.max_tokens or canvas, canvas)
    _check_block_length(config, server.block_length or defaults.block_length, canvas)
    _check_span(config, model_config)
    stages = Stages.of(config.tccf, model_config)
    if stages is not None and (params.logprobs is not None or config.step_map):
        raise ValueError(
            "tccf cannot be combined with logprobs or step_map: the check text is not "
            "the model's; ask for one or the other"
        )
    if stages is not None and params.max_tokens:
        stages.check_budget(params.max_tokens)
    if params.bad_words and config.verifies:
        raise ValueError(
            f"the strategy {config.strategy!r} writes the model's own text, and cannot "
            "take a token back for bad_words: leave one of them out"
        )
    if params.bad_words and defaults.noise == "uniform":
        raise ValueError(
            "this model writes all tokens of a canvas at once: none can be taken back "
            "for bad_words; leave them out; a logit_bias of -100 keeps a "
            "token out"
        )
    longest = params.max_tokens or model_config.max_model_len
    if config.canvas is not None:
        longest = config.canvas.width
    check_strategy(config, server, model_config, longest)
    return config


def refuse_unread_options(extra_args: Mapping[str, Any]) -> None:
    """Refuse keys that are meant as options, and that nobody would read.

    Raises:
        OptionError: it names the first one, and what to use.
    """
    for key in extra_args:
        if str(key).startswith(DIFFUSION_GEMMA):
            raise OptionError(
                f"{quote(key)} is an option of DiffusionGemma; the options of this "
                "model begin with `dlm_`, or sit in `dlm`",
                str(key),
            )
    own = own_options(extra_args)
    others = (key for key in extra_args if key not in own)
    refuse_unread(key for key in others if extra_args[key] is not None)


def _check_block_length(config: RequestConfig, own: int | str, canvas: int) -> None:
    """Refuse longer blocks than a request may ask for.

    Args:
        config: of the request, `sized`.
        own: the block length of the server, or of the model.
        canvas: most positions of a canvas.

    Raises:
        ValueError: it names the longest that is taken.
    """
    limit = canvas
    if own != WHOLE_CANVAS:
        limit = min(max(int(own), LONGEST_REQUEST_BLOCK), canvas)
    if config.canvas is not None and config.canvas.is_elastic:
        # What is written around the hole has no row of logits.
        ((_, length),) = config.canvas.holes
        if length > limit:
            raise ValueError(
                f"a hole of {length} tokens is more than this server takes in an "
                f"elastic one: {limit}; ask for less, or start the server with "
                "--dlm-block-length canvas"
            )
        return
    if config.block_length > limit:
        raise ValueError(
            f"block_length {config.block_length} is more than this server takes in a "
            f"request: {limit}; ask for less (for the whole canvas, lower max_tokens), "
            "or start the server with --dlm-block-length canvas"
        )


def _check_span(config: RequestConfig, model_config: ModelConfig) -> None:
    """Refuse more blocks together than a forward holds twice.

    Args:
        config: of the request, `sized`.

    Raises:
        ValueError: it names the longest that is taken.
    """
    most = getattr(model_config.hf_config, "dlm_longest_span", config.block_length)
    if config.attended_length < config.block_length > most:
        raise ValueError(
            f"block_length {config.block_length} is more than half of what a forward "
            f"of this server holds, and a span is computed along with the next: ask "
            f"for at most {most}, or raise --max-num-batched-tokens"
        )


def check_strategy(
    config: RequestConfig,
    server: DlmConfig,
    model_config: ModelConfig,
    max_tokens: int | None = None,
) -> None:
    """What a strategy itself asks of the model, the cache policy and files.

    Args:
        config: of a request, `sized`.
        max_tokens: of the request; None for what is not one.

    Raises:
        ValueError: its parameters do not fit them.
    """
    defaults = ModelDefaults.from_hf_config(model_config.hf_config)
    if STRATEGIES[config.strategy].soft(config.params) is not None:
        _check_soft_inputs(config.strategy, server.soft_inputs or defaults.soft_inputs)
    own_block = defaults.own_block(server.block_length)
    # The second stage of `tccf` is decoded in blocks of one.
    lengths = {config.block_length, 1} if config.tccf else {config.block_length}
    for length in sorted(lengths, reverse=True):
        positions = None
        if max_tokens is not None:
            positions = -(-min(max_tokens, model_config.max_model_len) // length)
            positions *= length
        context = Context(
            device=torch.device("cpu"),
            model=model_config.model,
            attention=defaults.attention,
            cache=config.cache,
            own_block=own_block,
            options=server.strategy_options(),
            positions=positions,
            vocab_size=model_config.get_vocab_size(),
            mask_id=defaults.mask_token_id,
            edit_tokens=edit_tokens_of(model_config.hf_config),
        )
        STRATEGIES[config.strategy].validate(config.params, length, context)


def _check_soft_inputs(strategy: str, are_made: bool) -> None:
    """Refuse mixtures of tokens where the network is fed tokens.

    Args:
        are_made: whether the engine makes input embeddings itself.

    Raises:
        ValueError: it does not; the message names the flag.
    """
    if not are_made:
        raise ValueError(
            f"the strategy {strategy!r} feeds the model mixtures of tokens, which this "
            "server does not make: start it with --dlm-soft-inputs, or choose another "
            "strategy"
        )
