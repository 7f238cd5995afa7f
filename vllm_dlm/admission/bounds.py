# SPDX-License-Identifier: Apache-2.0
"""Bounds on what multiplies a request's work: its numbers of ids, words and strings.

`docs/serving.md` lists these bounds and those that are set elsewhere. Which numbers and
ids are valid at all is `numbers.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_dlm.admission.client_fields import field_of
from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.messages import OptionError, quote

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.sampling_params import SamplingParams

MOST_STOP_IDS = 128
"""Stop ids: each position of a step's blocks is compared with all of them."""
MOST_STOP_STRINGS = 128
LONGEST_STOP_STRING = 1024
"""Characters. The front end looks for all stop strings behind every token."""
MOST_BAD_WORDS = 128
"""Bad words, as in vLLM, which counts the ways to cut them into tokens as well."""
LONGEST_BAD_WORD = 256
MOST_BAD_CHARACTERS = 2048
"""Characters of all bad words together: a token is compared with each word that holds
the token to its left, as often as the word holds it."""


def check_bounds(params: SamplingParams, model_config: ModelConfig) -> None:
    """Refuse what exceeds these bounds, and what leaves no token to write.

    Raises:
        OptionError: it names the parameter as the client did, and what is taken.
    """
    stops = [params.stop] if isinstance(params.stop, str) else params.stop or []
    words = params.bad_words or []
    _at_most(MOST_STOP_IDS, len(params.stop_token_ids or ()), "stop_token_ids", "ids")
    _at_most(MOST_STOP_STRINGS, len(stops), "stop", "strings")
    longest = max(map(len, stops), default=0)
    _at_most(LONGEST_STOP_STRING, longest, "stop", "characters in a string")
    _at_most(MOST_BAD_WORDS, len(words), "bad_words", "words")
    longest = max(map(len, words), default=0)
    _at_most(LONGEST_BAD_WORD, longest, "bad_words", "characters in a word")
    total = sum(map(len, words))
    _at_most(MOST_BAD_CHARACTERS, total, "bad_words", "characters")
    _check_characters(words)
    allowed = len(params.allowed_token_ids or ())
    _at_most(model_config.get_vocab_size(), allowed, "allowed_token_ids", "ids")
    _check_something_is_allowed(params, model_config)


def _at_most(most: int, count: int, parameter: str, unit: str) -> None:
    if count > most:
        raise OptionError(
            f"{field_of(parameter)} has {count} {unit}; at most {most} are taken",
            parameter,
        )


def _check_characters(words: Sequence[str]) -> None:
    """Bad words are cut into tokens, which a tokenizer cannot do with half a character
    (JSON has `\\ud800`)."""
    for number, word in enumerate(words):
        try:
            word.encode("utf-8")
        except UnicodeEncodeError:
            name = field_of("bad_words")
            raise OptionError(
                f"{name}: entry {number} holds half a character, which no text has: "
                f"{quote(word)}",
                "bad_words",
            ) from None


def _check_something_is_allowed(
    params: SamplingParams, model_config: ModelConfig
) -> None:
    if not params.allowed_token_ids:
        return
    defaults = ModelDefaults.from_hf_config(model_config.hf_config)
    mask = defaults.mask_token_id
    left = set(params.allowed_token_ids) - {mask}
    name = field_of("allowed_token_ids")
    if not left:
        raise OptionError(
            f"{name} holds only the mask token ({mask}), which is never written; add "
            "a token",
            "allowed_token_ids",
        )
    ends = {*(params.stop_token_ids or ()), *defaults.stop_ids}
    if params.min_tokens and left <= ends:
        raise OptionError(
            f"{name} holds only tokens that end the text, and "
            f"{field_of('min_tokens')} forbids to end it; add a token, or leave the "
            "latter out",
            "allowed_token_ids",
        )
