# SPDX-License-Identifier: Apache-2.0
"""Structured output: what a text must match is read, compiled and checked.

vLLM refuses constraints for diffusion models, and would have a scheduler wait for a
grammar. So the constraint is taken out of the sampling parameters here and goes to the
engine as a pattern, under a key of ours. Compiling may take a second: in a server, it
happens in a thread, while the handler of the request waits and others go on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from threading import Lock
from typing import TYPE_CHECKING, Any

from vllm_dlm.admission.client_fields import field_of
from vllm_dlm.admission.handover import note_pattern
from vllm_dlm.admission.waiting import FIELD, NotCompiledYet, somebody_waits
from vllm_dlm.config.canvas import Canvas
from vllm_dlm.config.constraints import why_unconstrained
from vllm_dlm.config.model import ModelDefaults, as_ids
from vllm_dlm.config.request import RequestConfig
from vllm_dlm.constraints.automaton import UNBOUNDED, Automaton
from vllm_dlm.constraints.cache import Cache, Compiled, Job, Source
from vllm_dlm.constraints.fitting import HOLE, first_misfit
from vllm_dlm.constraints.limits import ConstraintError
from vllm_dlm.constraints.paths import Completions, Graph
from vllm_dlm.constraints.shelf import Shelf, file_name
from vllm_dlm.constraints.vocabulary import Vocabulary
from vllm_dlm.messages import OptionError, quote

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams

AT_ONCE = 2
"""Threads that compile: cores that constraints may take from everybody else."""

_cache = Cache()
_lock = Lock()
_shelf = Shelf()
_running: dict[Any, Future[Any]] = {}


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(AT_ONCE, "vllm-dlm-compile")


def _start(job: Job) -> Future[Any]:
    """Compile in a thread; those who want the same wait for the same."""
    with _lock:
        running = _running.get(job.key)
        if running is None:
            running = _threads().submit(_run, job)
            _running[job.key] = running
            running.add_done_callback(lambda _: _running.pop(job.key, None))
        return running


def _run(job: Job) -> Compiled | ConstraintError:
    """Compile, and keep what comes out, for this process and for the engine's."""
    found = job.run()
    if isinstance(found, Compiled):
        ends = job.end_ids, job.barred
        name = file_name(found.pattern, job.thought, job.tokenizer, *ends)
        _shelf.put(name, found.automaton)
    _cache.put(job, found)
    return found


def constrain(
    params: SamplingParams, model_config: ModelConfig, config: RequestConfig
) -> None:
    """Check a request's constraint, and note its pattern in place of the constraint.

    Args:
        params: of one request; changed only if they can take notes.
        config: how the request will be decoded.

    Raises:
        OptionError: the constraint cannot be kept; it says what to change.
        NotCompiledYet: somebody waits for the request (`with_constraints`).
    """
    asked = params.structured_outputs
    if asked is None:
        return
    try:
        source = source_of(asked)
        _refuse_combinations(params, config)
        compiled = _compiled(_job(source, params, model_config))
        _check_lengths(params, compiled, config, model_config)
    except ConstraintError as error:
        join = "" if str(error).startswith(("cannot", "does not")) else ":"
        raise OptionError(f"{field_of(FIELD)}{join} {error}", FIELD) from None
    if note_pattern(params, compiled.pattern, _shelf.folder):
        params.structured_outputs = None


def _compiled(job: Job) -> Compiled:
    found = _cache.get(job)
    if found is None:
        if somebody_waits():
            raise NotCompiledYet(partial(_start, job))
        found = _run(job)
    if isinstance(found, ConstraintError):
        raise ConstraintError(str(found))
    return found


def source_of(asked: StructuredOutputsParams) -> Source:
    """What a request's text must match.

    Raises:
        ConstraintError: it says what is not supported, and what is.
    """
    if asked.grammar is not None:
        return Source("grammar", asked.grammar)
    if asked.regex is not None:
        if "\x00" in asked.regex:
            raise ConstraintError("regex must not hold a NUL character")
        return Source("regex", asked.regex)
    if asked.choice is not None:
        if not asked.choice or not all(isinstance(each, str) for each in asked.choice):
            raise ConstraintError("choice is a list of texts, with at least one")
        return Source("choice", json.dumps(asked.choice))
    if asked.structural_tag is not None:
        return Source("structural_tag", _as_json(asked.structural_tag))
    if asked.json_object is False:
        raise ConstraintError(
            "json_object is true or left out; without a constraint, leave out all of it"
        )
    whitespace = asked.whitespace_pattern
    if asked.disable_any_whitespace:
        whitespace = ""
    schema: Any = {"type": "object"} if asked.json is None else asked.json
    closed = asked.disable_additional_properties
    return Source(
        "json", _as_json(schema), whitespace, closed and asked.json is not None
    )


def _as_json(value: Any) -> str:
    """A value as JSON text; a text must be one already."""
    try:
        if not isinstance(value, str):
            return json.dumps(value)
        json.loads(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise ConstraintError(f"no JSON ({error!s:.100}), got {quote(value)}") from None
    return value


def _refuse_combinations(params: SamplingParams, config: RequestConfig) -> None:
    """Refuse what cannot be kept together with a constraint.

    Raises:
        ConstraintError: it names what to leave out.
    """
    if (why := why_unconstrained(config)) is not None:
        raise ConstraintError(why)
    if params.ignore_eos:
        raise ConstraintError(
            "cannot be combined with ignore_eos: a text that matches ends; leave one "
            "of them out"
        )
    if params.bad_words:
        raise ConstraintError(
            "cannot be combined with bad_words; write a pattern without these words"
        )


def _job(source: Source, params: SamplingParams, model_config: ModelConfig) -> Job:
    defaults = ModelDefaults.from_hf_config(model_config.hf_config)
    size = model_config.get_vocab_size()
    if model_config.skip_tokenizer_init:
        raise ConstraintError(
            "the server has no tokenizer (--skip-tokenizer-init), and what a token "
            "writes is not known; start it with one"
        )
    ends = {*(params.stop_token_ids or ()), *defaults.stop_ids}
    ends |= _ends_to_come(model_config)
    return Job(
        source=source,
        vocabulary=partial(vocabulary_of, model_config),
        tokenizer=_tokenizer_key(model_config),
        end_ids=tuple(sorted(token for token in ends if 0 <= token < size)),
        barred=barred_ids(params, size, defaults.no_text),
        thought=getattr(params.extra_args, "thought", None),
    )


_ends: dict[tuple[Any, ...], frozenset[int]] = {}


def _ends_to_come(model_config: ModelConfig) -> frozenset[int]:
    """Ids that vLLM will have a request end at once it is admitted.

    They are those of generation_config.json, and the tokenizer's. An engine that finds
    other ends than admission has compiled for compiles anew, and its step waits.
    """
    key = (model_config.model, model_config.generation_config)
    key += _tokenizer_key(model_config)
    if key not in _ends:
        from vllm.tokenizers import cached_tokenizer_from_config

        config = model_config.try_get_generation_config()
        own = cached_tokenizer_from_config(model_config).eos_token_id
        _ends[key] = frozenset(as_ids(config.get("eos_token_id")) + as_ids(own))
    return _ends[key]


def barred_ids(
    params: SamplingParams, vocab_size: int, no_text: Iterable[int]
) -> tuple[int, ...]:
    """Tokens that a request rules out everywhere, in rising order.

    Args:
        no_text: tokens of the model that are never written (`ModelDefaults.no_text`).
    """
    barred = {word[0] for word in params.bad_words_token_ids or () if len(word) == 1}
    barred.update(no_text)
    if params.allowed_token_ids:
        barred |= {*range(vocab_size)} - {*params.allowed_token_ids}
    return tuple(sorted(token for token in barred if 0 <= token < vocab_size))


def _tokenizer_key(model_config: ModelConfig) -> tuple[Any, ...]:
    return (
        model_config.tokenizer,
        model_config.tokenizer_revision,
        model_config.get_vocab_size(),
    )


_vocabularies: dict[tuple[Any, ...], Vocabulary] = {}


def vocabulary_of(model_config: ModelConfig) -> Vocabulary:
    """The vocabulary of a model's tokenizer, sorted once in a process.

    Raises:
        ConstraintError: the tokenizer does not say how its tokens are written.
    """
    from vllm.tokenizers import cached_tokenizer_from_config

    key = _tokenizer_key(model_config)
    if key not in _vocabularies:
        tokenizer = cached_tokenizer_from_config(model_config)
        size = model_config.get_vocab_size()
        _vocabularies[key] = Vocabulary.of_tokenizer(tokenizer, size)
    return _vocabularies[key]


def _check_canvas(canvas: Canvas, automaton: Automaton) -> None:
    """Refuse a canvas whose holes no text that matches can fill."""
    if canvas.shrinks:
        raise ConstraintError(
            "cannot be combined with holes 'shrink', of whose text some is left out; "
            "set holes to 'exact'"
        )
    handed = canvas.max_tokens
    holes = canvas.is_hole[:handed].tolist()
    place = first_misfit(
        automaton,
        [
            HOLE if hole else token
            for token, hole in zip(canvas.tokens[:handed], holes, strict=True)
        ],
        canvas.pins_end,
    )
    if place == handed:
        raise ConstraintError(
            f"no text that matches fits into the canvas of {handed} tokens; change "
            "the lengths of its holes"
        )
    if place is not None:
        what = "hole" if holes[place] else "given token"
        raise ConstraintError(
            f"no text that matches has the canvas's tokens at their places: at "
            f"position {place} (a {what}) none is left; change the canvas or the "
            "constraint"
        )


def _check_lengths(
    params: SamplingParams,
    compiled: Compiled,
    config: RequestConfig,
    model_config: ModelConfig,
) -> None:
    """Refuse a text that is too short for the shortest match, or longer than any, and a
    canvas that cannot be filled.

    Raises:
        ConstraintError: it names the least `max_tokens`, the most `min_tokens`, or the
            first position of the canvas that does not fit.
    """
    if config.canvas is not None:
        _check_canvas(config.canvas, compiled.automaton)
    automaton = compiled.automaton
    shortest = int(automaton.min_length[automaton.start])
    longest = int(automaton.max_length[automaton.start])
    most = params.max_tokens or model_config.max_model_len
    name = field_of("max_tokens")
    if shortest > most:
        raise ConstraintError(
            f"the shortest match has {shortest} tokens and {name} is {most}; set "
            f"{name} to at least {shortest}"
        )
    if longest != UNBOUNDED and params.min_tokens > longest:
        raise ConstraintError(
            f"the longest match has {longest} tokens and {field_of('min_tokens')} is "
            f"{params.min_tokens}; set it to at most {longest}"
        )
    least = min(params.min_tokens, most)
    if least and config.canvas is None:
        fits = Completions(automaton, Graph.of(automaton), most, least).at(0)
        if not fits[automaton.start]:
            raise ConstraintError(
                f"no match has {least} to {most} tokens; change "
                f"{field_of('min_tokens')} or {name}"
            )
