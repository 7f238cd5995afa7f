# SPDX-License-Identifier: Apache-2.0
"""Canvases that requests bring: made of ids, of a text with holes, or of a suffix.

All that needs the tokenizer or the request's lengths is here; what a canvas is, and
what it cannot be combined with, is `config/canvas.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_dlm.admission.canvas_text import Hole, parse
from vllm_dlm.admission.client_fields import field_of, gave_length, has_place_for
from vllm_dlm.admission.elastic import made_elastic
from vllm_dlm.config.canvas import Canvas, CanvasOptions, source_of
from vllm_dlm.config.elastic import INITIAL
from vllm_dlm.config.model import NO_MASK, ModelDefaults
from vllm_dlm.config.stop_ids import closing_ids
from vllm_dlm.messages import OptionError, quote

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.sampling_params import SamplingParams

NOT_SEEN = (
    "A request's canvas has text to the right of a hole that lies in an earlier block. "
    "This model decodes block after block: what is written to the right of the active "
    "block is not seen by it, and does not shape what fills the hole."
)


class Named(NamedTuple):
    """A hole with a name."""

    name: str
    start: int
    """Offset in the canvas."""
    length: int


class CanvasReader:
    """Builds the canvas of one request, as `resolve` wants it.

    Args:
        params: of the request.
        model_config: of one of our models.
        widest: most positions of a canvas that a model with full attention sees whole.
    """

    def __init__(
        self, params: SamplingParams, model_config: ModelConfig, widest: int
    ) -> None:
        self._params = params
        self._model_config = model_config
        self._widest = widest
        self._model = ModelDefaults.from_hf_config(model_config.hf_config)

    def __call__(self, options: CanvasOptions, names: Mapping[str, str]) -> Canvas:
        """The canvas.

        Raises:
            OptionError: the options make no canvas, or do not fit the other parameters.
        """
        source = source_of(options)
        assert source is not None
        set_as = names[source]
        more: dict[str, Any] = {
            "pinned": options.pinned is not False,
            "shrinks": options.holes == "shrink",
        }
        mask_id = self._model.mask_token_id
        if options.suffix is not None:
            canvas = self._before_suffix(options.suffix, set_as, more)
        elif options.canvas is not None:
            check_tokens(options.canvas, self._model_config, set_as)
            canvas = Canvas.of_ids(options.canvas, mask_id, **more)
        else:
            assert options.canvas_text is not None
            tokenize = tokenizer_of(self._model_config, set_as)
            tokens, holes, named = taken_apart(
                options.canvas_text, set_as, tokenize, mask_id
            )
            if named and not has_place_for("canvas_fields"):
                name = named[0].name
                raise OptionError(
                    f"{set_as}: the hole {quote(name)} has a name, and an answer of "
                    "this route has no place for the texts in such holes: leave the "
                    f"name out ({{{{{named[0].length}}}}}), or use /v1/completions or "
                    "/v1/chat/completions",
                    set_as,
                )
            written = [token for token in tokens if token != NO_MASK]
            check_tokens(written, self._model_config, set_as)
            canvas = Canvas(tuple(tokens), tuple(holes), **more)
        self._check(canvas, set_as)
        if options.holes == "elastic":
            initial = options.initial_hole or INITIAL
            params, model = self._params, self._model
            ends = closing_ids(params, model, self._model_config.hf_config)
            return made_elastic(canvas, initial, ends, params, model, names)
        return canvas

    def _before_suffix(
        self, suffix: str | Sequence[int], set_as: str, more: dict[str, Any]
    ) -> Canvas:
        """A hole of `max_tokens`, and the suffix behind it."""
        if self._model.reuses_blocks:
            raise OptionError(
                f"{set_as}: this model decodes block after block and does not see what "
                "is written behind the gap; choose a model with full attention, or "
                "leave the suffix out",
                set_as,
            )
        length = self._params.max_tokens
        if length is None:
            raise OptionError(
                f"{set_as}: the gap in front of it has no length; set "
                f"{field_of('max_tokens')}",
                set_as,
            )
        ids: Sequence[int] = (
            tokenizer_of(self._model_config, set_as)(suffix)
            if isinstance(suffix, str)
            else suffix
        )
        if len(ids) == 0:
            raise OptionError(
                f"{set_as} is empty: leave it out, or give it a token", set_as
            )
        check_tokens(ids, self._model_config, set_as)
        if length + len(ids) > self._model_config.max_model_len:
            raise OptionError(
                f"{set_as} has {len(ids)} tokens and {field_of('max_tokens')} is "
                f"{length}, together more than the context length of "
                f"{self._model_config.max_model_len}; lower one of them",
                set_as,
            )
        tokens = (*[self._model.mask_token_id] * length, *map(int, ids))
        return Canvas(tokens, ((0, length),), handed=length, **more)

    def _check(self, canvas: Canvas, set_as: str) -> None:
        """Refuse what cannot be filled, and say once what is not seen."""
        params, longest = self._params, self._model_config.max_model_len
        if not canvas.holes:
            mask_id = self._model.mask_token_id
            marks = "" if mask_id == NO_MASK else f"the mask id {mask_id} or, "
            raise OptionError(
                f"{set_as} has no hole, so there is nothing to write: put {marks}in "
                "canvas_text, {{12}} where the model shall write",
                set_as,
            )
        if canvas.width >= longest:
            raise OptionError(
                f"{set_as} has {canvas.width} positions, holes included, and the "
                f"context length is {longest}, of which the prompt needs a part: "
                "shorten the canvas",
                set_as,
            )
        if not self._model.reuses_blocks and canvas.width > self._widest:
            raise OptionError(
                f"{set_as}: the canvas has {canvas.width} positions, what is behind "
                "the answer included, and the widest that this server takes is "
                f"{self._widest}: shorten it, or raise --dlm-max-canvas",
                set_as,
            )
        given = params.max_tokens if gave_length(params) else None
        if given not in (None, canvas.max_tokens):
            name = field_of("max_tokens")
            raise OptionError(
                f"{set_as} has {canvas.width} positions and {name} is {given}: leave "
                f"{name} out, or set it to {canvas.width}",
                set_as,
            )
        ends = closing_ids(params, self._model, self._model_config.hf_config)
        name = field_of("min_tokens")
        if params.min_tokens > canvas.max_tokens:
            raise OptionError(
                f"{name} is {params.min_tokens}, and {set_as} has "
                f"{canvas.max_tokens} positions: lower it",
                "min_tokens",
            )
        if canvas.shrinks and (params.min_tokens or params.stop):
            parameter = "min_tokens" if params.min_tokens else "stop"
            raise OptionError(
                f"{field_of(parameter)} counts tokens of the answer, some of which "
                "holes that shrink leave out: leave it out, or set holes to 'exact'",
                parameter,
            )
        left = {*(params.allowed_token_ids or ())} - {self._model.mask_token_id}
        if left and not canvas.shrinks and left <= ends:
            raise OptionError(
                f"{field_of('allowed_token_ids')} holds only tokens that end the text, "
                "which fill no hole; add a token, or set holes to 'shrink'",
                "allowed_token_ids",
            )
        if self._model.reuses_blocks and len(canvas.holes) and canvas.pins_end:
            length = self._model.block_length
            if canvas.pins_end - canvas.holes[0][0] > length:
                from vllm.logger import init_logger

                init_logger(__name__).warning_once(NOT_SEEN)


def taken_apart(
    text: str, set_as: str, tokenize: Any, mask_id: int
) -> tuple[list[int], list[tuple[int, int]], list[Named]]:
    """A text with holes as token ids.

    Its pieces are cut into tokens one by one: at the seams the tokens may differ from
    those of the whole text.

    Args:
        tokenize: from a text to token ids, without special tokens around them.
        mask_id: stands in the holes.

    Returns:
        Ids; (first offset, length) of each hole; those that have names.
    """
    tokens: list[int] = []
    holes: list[tuple[int, int]] = []
    named: list[Named] = []
    for part in parse(text, set_as):
        if isinstance(part, Hole):
            holes.append((len(tokens), part.length))
            if part.name is not None:
                named.append(Named(part.name, len(tokens), part.length))
            tokens += [mask_id] * part.length
        else:
            tokens += tokenize(part)
    return tokens, holes, named


def tokenizer_of(model_config: ModelConfig, set_as: str) -> Any:
    """From a text to token ids, without special tokens around them.

    Raises:
        OptionError: the engine has no tokenizer.
    """
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(model_config)
    if tokenizer is None:
        raise OptionError(
            f"{set_as} is a text, and this engine has no tokenizer "
            "(skip_tokenizer_init): send token ids",
            set_as,
        )

    def tokenize(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    return tokenize


def check_tokens(ids: Sequence[int], model_config: ModelConfig, set_as: str) -> None:
    """Refuse the first id that is no token of the model.

    Raises:
        OptionError: it names the id.
    """
    size = model_config.get_vocab_size()
    for token in ids:
        if not 0 <= token < size:
            raise OptionError(
                f"{set_as}: {quote(token)} is no token of this model. Vocabulary size: "
                f"{size}, ids go from 0 to {size - 1}",
                set_as,
            )


def check_with_prompt(canvas: Canvas, prompt_len: int, max_model_len: int) -> None:
    """Refuse a canvas that does not fit behind its prompt.

    Raises:
        OptionError: it names the lengths.
    """
    if prompt_len + canvas.width > max_model_len:
        raise OptionError(
            f"the prompt has {prompt_len} tokens and the canvas {canvas.width} "
            f"positions, together more than the context length of {max_model_len}; "
            "shorten one of them",
            "prompt",
        )
