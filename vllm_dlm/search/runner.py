# SPDX-License-Identifier: Apache-2.0
"""`search.run`: one search for each prompt, all at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from vllm_dlm.config.validation import validated
from vllm_dlm.messages import quote
from vllm_dlm.search.base import Budget, Driver, Result, Scorer, Task, Text
from vllm_dlm.search.endpoint import Endpoint, EndpointError, HttpEngine
from vllm_dlm.search.jobs import Engine
from vllm_dlm.search.prompts import read_prompt
from vllm_dlm.search.pump import OnResult, Pump
from vllm_dlm.search.registry import SEARCHES


def run(
    llm: Any,
    driver: str | type[Driver] | Driver,
    prompts: Any,
    *,
    scorer: Scorer | None = None,
    budget: Budget | Mapping[str, Any] | None = None,
    sampling: Any = None,
    use_tqdm: bool = True,
    on_result: OnResult | None = None,
    **options: Any,
) -> list[Result]:
    """Search for the best answer to each prompt.

    Args:
        llm: a `vllm_dlm.LLM` or `vllm.LLM`, or an `Endpoint`.
        driver: name of a search (`vllm-dlm search --help` lists them), a subclass of
            `Driver`, or an object of one.
        prompts: texts, lists of token ids, lists of messages, or dicts that hold one
            of these as `prompt`, `prompt_token_ids` or `messages`; what else such a
            dict holds is `Candidate.record`.
        scorer: what says how good candidates are; a float for each, higher is better.
        budget: of each prompt: `tokens`, `requests`, `scores`, `seconds`.
        sampling: what every request has besides: `SamplingParams` or its fields; for
            an endpoint, fields of a request's body.
        use_tqdm: show a progress bar.
        on_result: is called with a prompt's number and its result, as soon as it is
            there.
        **options: of the driver: `vllm-dlm search NAME --help`.

    Returns:
        A `Result` for each prompt.

    Raises:
        ValueError: something is not valid, or does not go together; the message says
            what would be. Exceptions of the scorer come through as they are.
    """
    chosen = make_driver(driver, options)
    named = chosen.name
    limits = make_budget(budget)
    scorers = check_scorers(chosen, scorer)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    engines: list[Engine] = []
    try:
        for each in (llm, *chosen.engines()):
            engines.append(open_engine(each, sampling))
        _check(chosen, engines, scorer is not None)
        tasks = [
            _task(engines[0], index, prompt, scorer is not None)
            for index, prompt in enumerate(texts)
        ]
        with tqdm(
            total=len(tasks),
            desc=f"Search {named}",
            unit="prompt",
            dynamic_ncols=True,
            disable=not use_tqdm,
        ) as progress:
            tell = _reporter(progress, on_result)
            pump = Pump(engines, scorers, limits, chosen.seed, tell)
            return pump.run(tasks, [chosen.search(task) for task in tasks])
    finally:
        for engine in engines:
            engine.close()


def open_engine(llm: Any, sampling: Any) -> Engine:
    """What answers a search's requests.

    Raises:
        ValueError: nothing can be searched with it.
    """
    if isinstance(llm, Endpoint):
        return HttpEngine(llm, sampling)
    if isinstance(llm, str) and llm.startswith(("http://", "https://")):
        return HttpEngine(Endpoint(llm), sampling)
    if all(hasattr(llm, name) for name in ("submit", "poll", "pace")):
        engine: Engine = llm
        return engine
    from vllm import LLM

    if isinstance(llm, LLM):
        from vllm_dlm.search.engine import OfflineEngine

        return OfflineEngine(llm, sampling)
    raise ValueError(
        f"cannot search with {quote(llm)}: expected a vllm_dlm.LLM, a vllm.LLM, or a "
        "search.Endpoint (two models that write one text are searched over HTTP: "
        "vllm-dlm serve-pair)"
    )


def make_driver(
    driver: str | type[Driver] | Driver, options: Mapping[str, Any]
) -> Driver:
    """A driver with its options, checked.

    Raises:
        ValueError: there is no such driver, or an option is not valid.
    """
    if isinstance(driver, Driver):
        if options:
            raise ValueError(
                f"the search {driver.name!r} is made already: give {', '.join(options)}"
                " to its class"
            )
        return driver
    if isinstance(driver, type) and issubclass(driver, Driver):
        kind: type[Driver] = driver
    else:
        kind = SEARCHES[SEARCHES.check(driver)]
    return validated(
        kind,
        options,
        where=f"the search {kind.name!r}",
        numbers=number_fields(kind),
        hint=lambda name: "",
    )


def number_fields(kind: type[Driver]) -> list[str]:
    """Options that take numbers, for which a boolean is refused."""
    return [
        name
        for name, field in kind.model_fields.items()
        if field.annotation in (int, float, int | None, float | None)
    ]


def make_budget(budget: Budget | Mapping[str, Any] | None) -> Budget:
    """A budget, checked.

    Raises:
        ValueError: a part of it is not valid.
    """
    if isinstance(budget, Budget):
        return budget
    if not isinstance(budget, Mapping | None):
        raise ValueError(
            f"budget: expected a dict of {', '.join(Budget.model_fields)}, got "
            f"{quote(budget)}"
        )
    return validated(
        Budget,
        budget or {},
        where="budget",
        numbers=Budget.model_fields,
        hint=lambda name: "",
    )


def check_scorers(driver: Driver, scorer: Scorer | None) -> list[Scorer]:
    """All scorers of a search, the first of them the user's.

    Raises:
        ValueError: there is one too many, or none.
    """
    named = driver.name
    if scorer is not None and not callable(scorer):
        raise ValueError(
            f"scorer: {quote(scorer)} cannot be called; expected a function from a "
            "list of candidates to a list of numbers"
        )
    if scorer is None and driver.scorer == "needed":
        without = [name for name in SEARCHES if SEARCHES[name].scorer != "needed"]
        raise ValueError(
            f"the search {named!r} needs a scorer; without one work: "
            f"{', '.join(without)}"
        )
    if scorer is not None and driver.scorer == "unused":
        using = [name for name in SEARCHES if SEARCHES[name].scorer != "unused"]
        raise ValueError(
            f"the search {named!r} asks no scorer: leave it out, or take one of: "
            f"{', '.join(using)}"
        )
    own = [] if scorer is None else [scorer]
    return [*own, *driver.scorers()]


def _check(driver: Driver, engines: Sequence[Engine], has_scorer: bool) -> None:
    """Refuse what the engine, or the engines together, cannot do.

    Raises:
        ValueError: what, and what would work.
    """
    first, *others = engines
    named = driver.name
    if driver.branches and first.kind != "autoregressive":
        raise ValueError(
            f"the search {named!r} looks at next tokens, and a diffusion model has "
            f"none; take one of: {', '.join(without_branches())}"
        )
    if driver.branches and isinstance(first, HttpEngine) and not first.ends:
        raise ValueError(
            f"the search {named!r} must know which tokens end a text, which an "
            "endpoint does not tell: name them as end_tokens (--end-token)"
        )
    try:
        driver.check(first.kind, has_scorer)
        for options in driver.request_options():
            first.check_options(options)
    except ValueError as error:
        raise ValueError(f"the search {named!r}: {error}") from None
    ours = first.vocabulary()
    for other in others:
        theirs = other.vocabulary()
        if ours is not None and theirs is not None and ours != theirs:
            raise ValueError(
                "continue_with: the two models have different tokenizers; they must "
                "share one: take two sizes of one family"
            )


def without_branches() -> list[str]:
    """The searches that diffusion models can have too."""
    return [name for name in SEARCHES if not SEARCHES[name].branches]


def _task(engine: Engine, index: int, prompt: Any, has_scorer: bool) -> Task:
    try:
        shown, record = read_prompt(prompt)
        tokens = engine.encode(shown)
    except EndpointError:
        raise
    except ValueError as error:
        raise ValueError(f"prompt {index}: {error}") from None
    if not tokens:
        raise ValueError(f"prompt {index} is empty")
    return Task(
        prompt=shown,
        index=index,
        start=Text(tokens),
        to_text=engine.decode,
        to_tokens=engine.encode_text,
        ends=engine.ends,
        stops=engine.stops,
        kind=engine.kind,
        has_scorer=has_scorer,
        record=record,
    )


def _reporter(progress: tqdm[Any], on_result: OnResult | None) -> OnResult:
    """Shows how far a search is, and how much was written for it."""
    generated = 0

    def tell(index: int, result: Result) -> None:
        nonlocal generated
        generated += result.stats.generated
        progress.set_postfix_str(f"{generated} tokens", refresh=False)
        progress.update()
        if on_result is not None:
            on_result(index, result)

    return tell
