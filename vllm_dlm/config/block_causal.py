# SPDX-License-Identifier: Apache-2.0
"""What models that decode block after block cannot do, and what they alone can.

In a block-causal model the keys and values of a finished block are final. So nothing
may be decided over the whole output, and all requests share one block length.
"""

from __future__ import annotations

from collections.abc import Mapping

from vllm_dlm.config.cache import Cache
from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.option_types import WHOLE_CANVAS
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import Params


def check_block_causal(
    strategy: str,
    cache: Cache,
    model: ModelDefaults,
    *,
    block_length: int,
    sub_block_length: int,
    trained: int | str,
) -> None:
    """Refuse what a block-causal model cannot do.

    Args:
        strategy, cache: what a request is decoded with.
        model: what the model declares.
        block_length: in positions; 0 for the whole canvas.
        sub_block_length: in positions; 0 for the whole block.
        trained: the block length that the server or the model declares.

    Raises:
        ValueError: the request asks for it.
    """
    if STRATEGIES[strategy].scope == "canvas":
        served = [name for name in STRATEGIES if STRATEGIES[name].scope != "canvas"]
        raise ValueError(
            f"the strategy {strategy!r} decides over the whole output at once, "
            "which needs full attention; this model is block-causal. It serves: "
            f"{', '.join(served)}"
        )
    if trained == WHOLE_CANVAS:
        raise ValueError(
            "block_length 'canvas' is for models with full attention; this one is "
            "block-causal: give the length its blocks were trained with"
        )
    if STRATEGIES[strategy].scope == "blocks":
        _check_blocks(strategy, cache, model, block_length, sub_block_length, trained)
        return
    if block_length != trained:
        raise ValueError(
            f"block_length is {trained} for all requests of this block-causal model: "
            "the KV of a prompt depends on it; only the server can change it "
            "(--dlm-block-length)"
        )
    if cache not in ("none", "dual"):
        raise ValueError(
            f"cache {cache!r} is for models with full attention; this one is "
            "block-causal and keeps what is final in any case: leave it at 'none', or "
            "set 'dual' if its blocks are written in sub-blocks"
        )
    has_parts = 0 < sub_block_length < block_length
    if cache == "dual" and not has_parts:
        raise ValueError(
            "cache 'dual' of a block-causal model computes sub-blocks alone, and its "
            f"blocks of {block_length} have none here: leave it at 'none', or "
            f"set sub_block_length below {block_length}"
        )


def _check_blocks(
    strategy: str,
    cache: Cache,
    model: ModelDefaults,
    block_length: int,
    sub_block_length: int,
    trained: int | str,
) -> None:
    """Refuse what a strategy that decides several blocks together cannot do."""
    assert isinstance(trained, int)
    if model.attention != "block" or model.leads_blocks:
        raise ValueError(
            f"the strategy {strategy!r} decides several blocks together, but this "
            "model begins a block only when the one before is finished: name another"
        )
    if block_length == 0 or block_length % trained:
        raise ValueError(
            f"block_length is how many positions the strategy {strategy!r} decides "
            f"together, whole blocks of this model: a multiple of {trained}"
        )
    if cache != "none":
        raise ValueError(
            f"cache {cache!r} computes a part of a block, and the strategy "
            f"{strategy!r} decides several blocks: leave it at 'none'"
        )
    if sub_block_length:
        raise ValueError(
            f"sub_block_length is for strategies that decide one block, {strategy!r} "
            "decides several: leave it out"
        )


def check_ahead(strategy: str, params: Params, model: ModelDefaults) -> int:
    """Positions behind the active block that a forward may write too.

    Args:
        strategy, params: what a request is decoded with.
        model: what the model declares.

    Raises:
        ValueError: the strategy looks ahead, and the model does not allow it.
    """
    ahead = STRATEGIES[strategy].looks_ahead(params)
    if ahead and (model.attention != "block" or model.leads_blocks):
        reason = "decides the first token of a block alone"
        if model.attention == "full":
            reason = "has full attention, where a full block's keys do not stay"
        raise ValueError(
            f"the strategy {strategy!r} would draft blocks to come (eager), and this "
            f"model {reason}: leave eager out"
        )
    return ahead


def check_verifying(
    strategy: str, model: ModelDefaults, options: Mapping[str, bool]
) -> None:
    """Refuse what a strategy that drafts a block and verifies it causally cannot do.

    Args:
        strategy: of the request.
        model: what the model declares.
        options: that look at steps of a block, and whether each of them is set.

    Raises:
        ValueError: the model is another, or an option looks at the steps of a block.
    """
    if model.attention != "causal" or not model.leads_blocks:
        raise ValueError(
            f"the strategy {strategy!r} verifies drafts as an autoregressive model "
            "reads them, which needs a causal model that predicts the next token too "
            "(Nemotron-Labs-Diffusion); for this model use 'freedave' or 'threshold'"
        )
    asked = [option for option, is_set in options.items() if is_set]
    if asked:
        raise ValueError(
            f"the strategy {strategy!r} writes text left to right and has no steps "
            f"of a block: leave out {', '.join(asked)}"
        )
