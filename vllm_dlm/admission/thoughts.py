# SPDX-License-Identifier: Apache-2.0
"""Constraints where thoughts are told from answers: they hold behind the thought.

vLLM's reasoning parser says whether the prompt has ended the thought already, as chat
templates do when asked not to think. Where it has not, the answer begins with a thought
and the parser says which token ends it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_dlm.admission.client_fields import field_of
from vllm_dlm.admission.handover import NotedOptions
from vllm_dlm.admission.waiting import FIELD
from vllm_dlm.messages import OptionError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams


def note_thought(
    params: SamplingParams,
    prompt: Any,
    vllm_config: VllmConfig,
    parser_options: Mapping[str, Any] | None = None,
) -> None:
    """Note what ends the thought in front of what a request's constraint is about.

    Args:
        params: of one request, which take notes.
        prompt: as the engine takes it.
        parser_options: of the request's reasoning parser, as vLLM's server has them.

    Raises:
        OptionError: the server has a parser of which that cannot be known.
    """
    asked = params.extra_args
    if params.structured_outputs is None or not isinstance(asked, NotedOptions):
        return
    settings = vllm_config.structured_outputs_config
    if not settings.reasoning_parser or settings.enable_in_reasoning:
        return
    name = settings.reasoning_parser
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
    if ids is None:
        raise _refusal(name, "and the prompt has no tokens to look for its end in")
    from vllm.reasoning import ReasoningParserManager
    from vllm.tokenizers import cached_tokenizer_from_config

    # Compiled code comes with it, which a process without constraints does not need.
    from vllm_dlm.constraints.thoughts import ThoughtEnd

    tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
    kind = ReasoningParserManager.get_reasoning_parser(name)
    parser = kind(tokenizer, **(parser_options or {}))
    if parser.is_reasoning_end(list(ids)):
        return
    text = getattr(parser, "reasoning_end_str", None)
    token = tokenizer.get_vocab().get(text) if text else None
    if text is None or token is None:
        raise _refusal(name, "and does not say by which token a thought ends")
    asked.thought = ThoughtEnd(token, text)


def _refusal(parser: str, why: str) -> OptionError:
    return OptionError(
        f"{field_of(FIELD)}: this server's --reasoning-parser {parser} looks for a "
        f"thought in front of the answer, {why}; start the server without, or ask "
        "without a constraint",
        FIELD,
    )
