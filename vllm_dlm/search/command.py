# SPDX-License-Identifier: Apache-2.0
"""`vllm-dlm search DRIVER MODEL`: its arguments, and the search."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from pydantic.fields import FieldInfo

from vllm_dlm.cli.arguments import count, output_file
from vllm_dlm.files.python_files import callables_in, load_file
from vllm_dlm.files.whole_files import BadFile, parse_json, parse_lines, replacing
from vllm_dlm.messages import metavar_of, quote
from vllm_dlm.search.base import Budget, Driver, Result
from vllm_dlm.search.prompts import FORMS
from vllm_dlm.search.registry import SEARCHES
from vllm_dlm.search.runner import check_scorers, make_budget, make_driver
from vllm_dlm.search.runner import run as search

URLS = ("http://", "https://")
OBJECTS = ("key", "policy", "baseline")
"""Options of drivers that are objects: on the command line FILE.py:name."""
MODELS = ("continue_with",)
"""Options of drivers that are models, as MODEL is."""

EPILOG = """\
A scorer is a function in a file of yours: from a list of candidates to a number for
each, higher is better. A candidate has .prompt, .text, .token_ids, .finished, .index,
and .record with whatever else stood in the prompt's JSON line:

  # check.py
  def check(candidates):
      return [float(one.text == one.record["answer"]) for one in candidates]

examples:
  vllm-dlm search best_of_n llada-tiny --prompts questions.jsonl \\
      --scorer check.py:check --n 8 --max-tokens 64
  vllm-dlm search mcts llama-tiny --prompts questions.jsonl --scorer check.py:check
  vllm-dlm search vote http://localhost:8000/v1 --prompts questions.txt --n 16

What each search does, and what it gains: docs/search.md
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vllm-dlm search`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Search for better answers: ask a model for several texts, or look at what\n"
        "follows each token, and keep the best. vllm-dlm search DRIVER --help lists a\n"
        "driver's options."
    )
    parser.epilog = EPILOG
    drivers = parser.add_subparsers(dest="driver", metavar="DRIVER", required=True)
    for name in SEARCHES:
        kind = SEARCHES[name]
        source = f" ({kind.paper})" if kind.paper else ""
        driver = drivers.add_parser(
            name,
            help=kind.summary,
            description=textwrap.fill(
                f"{name}: {kind.summary}{source}. {_about(kind)}", 80
            ),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=EPILOG,
        )
        _add_common(driver)
        options = driver.add_argument_group(f"options of {name}")
        for option, field in kind.model_fields.items():
            _add_option(options, option, field)


def _about(kind: type[Driver]) -> str:
    scorer = {
        "needed": "It needs a scorer.",
        "optional": "It works with a scorer and without.",
        "unused": "It asks no scorer.",
    }[kind.scorer]
    models = "of autoregressive models only" if kind.branches else "of any model"
    return f"{scorer} It is a search {models}."


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="alias, folder or hub id, as for `vllm serve`, or the address of an "
        "OpenAI API: http://HOST:PORT/v1",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        required=True,
        help="a prompt in each line, or JSON lines that hold one of "
        f"{', '.join(FORMS)}; further fields are the candidates' `record`",
    )
    parser.add_argument(
        "--scorer",
        metavar="FILE.py:NAME",
        help="function that says how good candidates are",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="put each prompt into the model's chat template",
    )
    parser.add_argument(
        "--num", type=count, metavar="N", help="only the first N prompts"
    )
    parser.add_argument(
        "--out",
        type=output_file,
        metavar="FILE",
        help="write the JSON lines to a file, when all are there; else they are "
        "printed, each as soon as it is there",
    )
    parser.add_argument(
        "--all", action="store_true", help="write all candidates, not only the best"
    )
    parser.add_argument(
        "--sampling",
        metavar="JSON",
        default={},
        type=_object,
        help="what every request has besides: fields of SamplingParams, as "
        '{"top_p": 0.9, "extra_args": {"dlm": {"block_length": 8}}}; with an address, '
        "fields of a request's body",
    )
    model = parser.add_argument_group("a model in this process")
    model.add_argument(
        "--engine",
        metavar="JSON",
        default={},
        type=_object,
        help='arguments of vllm_dlm.LLM, as {"max_model_len": 4096}',
    )
    endpoint = parser.add_argument_group("an OpenAI API (its key: $OPENAI_API_KEY)")
    endpoint.add_argument(
        "--served-model", metavar="NAME", help="default: the first that it lists"
    )
    endpoint.add_argument(
        "--end-token",
        metavar="TEXT",
        action="append",
        default=[],
        help="a token that ends the model's texts; may be repeated",
    )
    endpoint.add_argument(
        "--tokens",
        choices=("auto", "ids", "text"),
        default="auto",
        help="what the API tells of tokens: ids (vLLM) or their text (default: "
        "%(default)s)",
    )
    endpoint.add_argument(
        "--concurrency",
        type=count,
        default=32,
        help="requests at a time (default: %(default)s)",
    )
    budget = parser.add_argument_group("budget of each prompt")
    for name, field in Budget.model_fields.items():
        budget.add_argument(
            f"--budget-{name}",
            metavar="N",
            type=_value,
            help=field.description,
        )


def _add_option(group: Any, name: str, field: FieldInfo) -> None:
    flag = f"--{name.replace('_', '-')}"
    text = (field.description or "").replace("%", "%%")
    if not isinstance(field.default, bool | None) and "efault" not in text:
        text = f"{text.rstrip('.')} (default: {field.default})"
    options: dict[str, Any] = {"dest": f"option_{name}", "default": None}
    if name in OBJECTS:
        group.add_argument(flag, metavar="FILE.py:NAME", help=text, **options)
    elif name in MODELS:
        group.add_argument(flag, metavar="MODEL", help=text, **options)
    elif field.annotation is bool:
        action = argparse.BooleanOptionalAction
        group.add_argument(flag, action=action, help=text, **options)
    elif "tuple[str" in str(field.annotation):
        text = f"{text} May be repeated; \\n is a line break."
        group.add_argument(
            flag, metavar="TEXT", action="append", type=_unescaped, help=text, **options
        )
    else:
        metavar = metavar_of(field)
        group.add_argument(flag, metavar=metavar, type=_value, help=text, **options)


def run(args: argparse.Namespace) -> int:
    """Search, and write what was found."""
    # What is printed is for other programs to read.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    scorer = None if args.scorer is None else load_object(args.scorer, "scorer")
    options = {
        name: getattr(args, f"option_{name}")
        for name in SEARCHES[args.driver].model_fields
        if getattr(args, f"option_{name}") is not None
    }
    for name in OBJECTS:
        if name in options:
            options[name] = load_object(options[name], name)
            if name == "policy" and isinstance(options[name], type):
                options[name] = options[name]()
    budget = {name: getattr(args, f"budget_{name}") for name in Budget.model_fields}
    # What is wrong shows before a model is loaded.
    make_budget(budget)
    check_scorers(make_driver(args.driver, options), scorer)
    prompts = read_prompts(args.prompts, args.num, args.chat)
    for name in MODELS:
        if name in options:
            options[name] = _open_model(options[name], args)
    llm = _open_model(args.model, args)
    with _output(args.out) as file:

        def write(index: int, result: Result) -> None:
            print(json.dumps(as_line(index, result, args.all)), file=file, flush=True)

        search(
            llm,
            args.driver,
            prompts,
            scorer=scorer,
            budget=budget,
            sampling=args.sampling or None,
            on_result=write,
            **options,
        )
    return 0


def _open_model(name: str, args: argparse.Namespace) -> Any:
    if name.startswith(URLS):
        from vllm_dlm.search.endpoint import Endpoint

        if args.engine:
            raise ValueError("--engine is for a model in this process, not an address")
        return Endpoint(
            name,
            model=args.served_model,
            end_tokens=args.end_token,
            tokens=args.tokens,
            concurrency=args.concurrency,
        )
    from vllm_dlm.entrypoints.llm import LLM

    return LLM(name, **{"disable_log_stats": True, **args.engine})


@contextlib.contextmanager
def _output(path: Path | None) -> Iterator[IO[str]]:
    """Where the lines go; texts of users are for the file's owner alone."""
    if path is None:
        yield sys.stdout
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(path, private=True) as written,
        written.open("w", encoding="utf-8") as file,
    ):
        yield file


def as_line(index: int, result: Result, everything: bool) -> dict[str, Any]:
    """A result as a JSON line holds it."""
    best = result.best
    line = {"index": index, "prompt": best.prompt, **_candidate(best)}
    if everything:
        line["candidates"] = [_candidate(each) for each in result.candidates]
    return {**line, "stats": vars(result.stats)}


def _candidate(candidate: Any) -> dict[str, Any]:
    score = candidate.score
    # JSON has no infinity.
    is_finite = score is not None and abs(score) != float("inf")
    return {
        "text": candidate.text,
        "score": score if is_finite or score is None else str(score),
        "finished": candidate.finished,
        "logprob": candidate.state.logprob,
        "tokens": len(candidate.token_ids),
        "origin": candidate.origin,
    }


def read_prompts(path: str, most: int | None, chat: bool) -> list[Any]:
    """The prompts of a file: texts, or the records of its JSON lines.

    Raises:
        BadFile: a line holds no prompt, or none does.
    """
    prompts = parse_lines(path, "prompts", lambda line: _prompt(line, chat), most)
    if not prompts:
        raise BadFile("prompts", path, "it holds none")
    return prompts


def _prompt(line: str, chat: bool) -> Any:
    record: dict[str, Any] = {"prompt": line}
    if line.lstrip().startswith("{"):
        record = parse_json(line)
        if not any(form in record for form in FORMS):
            raise ValueError(f"expected one of the fields {', '.join(FORMS)}")
    if not chat:
        return record
    form = next(form for form in FORMS if form in record)
    if not isinstance(record[form], str):
        raise ValueError(f"--chat is for texts, and {form} is {quote(record[form])}")
    text = record.pop(form)
    return {**record, "messages": [{"role": "user", "content": text}]}


def load_object(target: str, what: str) -> Callable[..., Any]:
    """What is called `NAME` in `FILE.py`.

    Raises:
        ValueError: there is no such file or name; the message lists the names.
    """
    path, _, name = target.rpartition(":")
    if not path or not name:
        raise ValueError(f"--{what} {quote(target)}: expected FILE.py:NAME")
    module = load_file(Path(path), f"--{what}")
    found = getattr(module, name, None)
    if found is None:
        names = ", ".join(callables_in(module)) or "nothing"
        raise ValueError(f"--{what}: {path} has no {name!r}; it has: {names}")
    return found  # type: ignore[no-any-return]


def _object(text: str) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no JSON object: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value


def _value(text: str) -> Any:
    """A number, a list or an object where the text is one in JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _unescaped(text: str) -> str:
    return text.replace("\\n", "\n")
