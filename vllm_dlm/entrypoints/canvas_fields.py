# SPDX-License-Identifier: Apache-2.0
"""What a model has written into the named holes of a `canvas_text`.

Offline, `fields` reads them off a finished output; over HTTP each choice of a whole
answer has them as its object `fields`. A streamed answer has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from vllm_dlm.admission.canvases import Named, taken_apart
from vllm_dlm.config.request_options import read_request
from vllm_dlm.entrypoints.step_maps import has_step_map

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.tokenizers import TokenizerLike


def fields(
    output: RequestOutput | CompletionOutput,
    params: SamplingParams,
    tokenizer: TokenizerLike,
) -> dict[str, str]:
    """The texts in the named holes of a finished output, by name.

    Args:
        output: with `n` above 1 one of `RequestOutput.outputs`.
        params: with which it was asked for; their `canvas_text` names the holes.
        tokenizer: of the model, as `LLM.get_tokenizer` gives it.

    Raises:
        ValueError: there are several outputs, or the request has brought no such text.
    """
    completions: list[CompletionOutput] = getattr(output, "outputs", [output])
    if len(completions) != 1:
        raise ValueError(
            f"the request has {len(completions)} outputs, with fields each: pass one "
            "of its `outputs`"
        )
    named = _named_holes(params.extra_args, tokenizer)
    if named is None:
        raise ValueError(
            "the parameters have no canvas_text: its named holes are the fields"
        )
    return _texts(completions[0], named, tokenizer)


def add_to_choices(
    choices: Iterable[Any],
    outputs: Iterable[CompletionOutput],
    extra_args: Mapping[str, Any] | None,
    model_config: ModelConfig,
) -> None:
    """Give each choice of an HTTP answer its fields, if its request has named some.

    Args:
        extra_args: the request's `vllm_xargs`.
    """
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(model_config)
    named = None if tokenizer is None else _named_holes(extra_args, tokenizer)
    if named:
        for choice, output in zip(choices, outputs, strict=True):
            choice.fields = _texts(output, named, tokenizer)


def _named_holes(
    extra_args: Mapping[str, Any] | None, tokenizer: TokenizerLike
) -> list[Named] | None:
    """The named holes of a request's text; None without such a text."""
    if not extra_args:
        return None
    text = read_request(extra_args).canvas.canvas_text
    if text is None:
        return None

    def tokenize(piece: str) -> list[int]:
        return list(tokenizer.encode(piece, add_special_tokens=False))

    return taken_apart(text, "canvas_text", tokenize, 0)[2]


def _texts(
    output: CompletionOutput, named: list[Named], tokenizer: TokenizerLike
) -> dict[str, str]:
    tokens = list(output.token_ids)
    offsets: Iterable[float] = range(len(tokens))
    rows = output.routed_experts
    if rows is not None and rows.shape[1] > has_step_map(output) * 3:
        offsets = rows[: len(tokens), -1].tolist()  # holes that have shrunk
    at = {int(offset): token for offset, token in zip(offsets, tokens, strict=True)}
    return {
        hole.name: tokenizer.decode(
            [at[i] for i in range(hole.start, hole.start + hole.length) if i in at],
            skip_special_tokens=True,
        )
        for hole in named
    }
