# SPDX-License-Identifier: Apache-2.0
"""What models that denoise random tokens cannot do, and which strategies serve them.

They have no mask: until a canvas is finished, each of its positions holds a token that
the next step may change. So nothing can be said of a position before, and what is made
for masks has no meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.messages import OptionError
from vllm_dlm.strategies import STRATEGIES

if TYPE_CHECKING:
    from vllm_dlm.config.options import DlmConfig


def check_noise(
    strategy: str,
    model: ModelDefaults,
    options: Mapping[str, bool],
    names: Mapping[str, str],
) -> None:
    """Refuse a strategy that is made for the other kind of models, and options.

    Args:
        strategy: of a request.
        model: what the model declares.
        options: that need a mask, and whether each of them is set.
        names: of those that were set under another name.

    Raises:
        ValueError: the request or the server asks for it.
    """
    kind = STRATEGIES[strategy].noise
    if kind != model.noise:
        served = [name for name in STRATEGIES if STRATEGIES[name].noise == model.noise]
        what = {"mask": "masks", "uniform": "random tokens"}
        raise ValueError(
            f"the strategy {strategy!r} is for models that replace {what[kind]}; this "
            f"one replaces {what[model.noise]}. It serves: {', '.join(served)}"
        )
    if model.noise == "mask":
        return
    asked = [option for option, is_set in options.items() if is_set]
    if asked:
        set_as = names.get(asked[0], asked[0])
        instead = "set canvas_text" if asked[0] == "canvas" else "leave it out"
        raise OptionError(
            f"{set_as} is for models with a mask: this one holds random tokens until a "
            f"whole canvas is finished; {instead}",
            set_as,
        )


def check_canvas_length(server: DlmConfig, model: ModelDefaults) -> None:
    """Refuse another canvas than a model of this kind was trained with.

    Raises:
        ValueError: the server asks for one.
    """
    length = server.block_length
    if model.noise == "uniform" and length not in (None, model.block_length):
        raise ValueError(
            f"block_length {length} is not this model's canvas of {model.block_length} "
            "tokens, the only one that it was trained for; leave it out"
        )
