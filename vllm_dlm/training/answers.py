# SPDX-License-Identifier: Apache-2.0
"""A model's own answers, as data to train it on: `vllm-dlm answers MODEL OUT`.

Certainty forcing and its relatives learn from what the model itself says: forced to be
certain of foreign text it would be wrongly so. The answers come from our own engine,
by default as `static` writes them, one token per step at temperature 0, and with the
built-in tasks only right ones are kept.

The file has one row a line, in a form that `rows.read_rows` reads. It is written when
all prompts are answered; what is there of an interrupted run lies in OUT.part, and the
same command goes on behind it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_dlm.cli.arguments import count, output_file
from vllm_dlm.files.whole_files import parse_json, replacing
from vllm_dlm.learn2pd.collect import read_prompt_file
from vllm_dlm.messages import unknown
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.tasks import tokenizer
from vllm_dlm.tasks.problems import TASKS, Problem, sample_problems
from vllm_dlm.training.answer_log import Answer, append_answers, read_answers
from vllm_dlm.training.drafters.teacher import load_tokenizer

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

# Prompts that are handed to the engine at once; the file grows after each part.
PART = 256


@dataclass(frozen=True)
class Question:
    """A prompt, as a text or as token ids; of a built-in task, with its problem."""

    prompt: str | list[int]
    problem: Problem | None = None

    def is_right(self, text: str) -> bool | None:
        """Whether an answer is right; None where no program can say so."""
        return None if self.problem is None else self.problem.check(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vllm-dlm answers`."""
    parser.add_argument("model", help="alias, folder or hub id, as for `vllm serve`")
    parser.add_argument("out", type=output_file, help="file to write (.jsonl)")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="one prompt per line, or JSON lines with a `prompt`, `question` or `text` "
        "field (by default problems of the built-in tasks, for a model with "
        "llada-tiny's tokenizer)",
    )
    parser.add_argument(
        "--num", type=count, default=5000, help="most prompts (default: %(default)s)"
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="put each prompt of the file into the model's chat template; of the "
        "built-in tasks, every other one is a chat in any case",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="NAME",
        help=f"built-in tasks to draw from: {', '.join(TASKS)} (default: all)",
    )
    parser.add_argument(
        "--keep-wrong",
        action="store_true",
        help="keep wrong answers to the built-in tasks too",
    )
    parser.add_argument("--max-tokens", type=count, default=256)
    parser.add_argument("--block-length", type=count, help="default: the model's own")
    parser.add_argument(
        "--strategy",
        default="static",
        help="how to decode (default: %(default)s, one token per step)",
    )
    parser.add_argument(
        "--strategy-config",
        type=parse_json,
        default={},
        metavar="JSON",
        help="the strategy's parameters, as a JSON object",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="default: %(default)s"
    )
    parser.add_argument(
        "--trajectory-dir",
        metavar="FOLDER",
        help="log the canvases of all steps there, for `vllm-dlm train d3llm`",
    )
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    """Decode prompts and write the rows."""
    check_arguments(args)
    questions = read_questions(args)
    part = Path(f"{args.out}.part")
    command = _command(args)
    done = read_answers(part, command)
    if len(done) < len(questions):
        from vllm_dlm.entrypoints.llm import LLM

        folder = args.trajectory_dir
        given = {} if folder is None else {"dlm_trajectory_dir": folder}
        llm = LLM(args.model, seed=args.seed, **given)
        for answers in ask(llm, args, questions, len(done)):
            append_answers(part, command, answers)
            done += answers
    kept = [row for row in done if row.right is not False or args.keep_wrong]
    if not kept:
        raise ValueError(f"no answer to the {len(done)} prompts was right")
    with replacing(args.out) as file:
        file.write_text("".join(map(_row_line, kept)), encoding="utf-8")
    part.unlink(missing_ok=True)
    print(f"{len(kept)} of {len(done)} answers kept -> {args.out}")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what could not work, or would be ignored, before an engine starts.

    Raises:
        ValueError: an option that is not valid, or not beside another one.
    """
    if args.strategy not in STRATEGIES:
        raise ValueError(f"--strategy: {unknown(args.strategy, STRATEGIES)}")
    for name in args.tasks or ():
        if name not in TASKS:
            raise ValueError(f"--tasks: {unknown(name, TASKS)}")
    if args.prompts is not None:
        for option in ("tasks", "keep_wrong"):
            if getattr(args, option):
                raise ValueError(
                    f"--{option.replace('_', '-')} is for the built-in tasks, and "
                    "--prompts asks others; leave one of them out"
                )
    elif args.chat:
        raise ValueError(
            "--chat is for --prompts; of the built-in tasks every other one is a chat"
        )
    if not isinstance(args.strategy_config, dict):
        raise ValueError(
            "--strategy-config: expected a JSON object, such as '{\"threshold\": 0.9}'"
        )
    if args.temperature < 0:
        raise ValueError(f"--temperature is 0 or more, not {args.temperature}")


def read_questions(args: argparse.Namespace) -> list[Question]:
    """What to ask.

    Raises:
        ValueError: the file cannot be read; or there is none, and the model has not
            the tokenizer of the built-in tasks.
    """
    if args.prompts is not None:
        texts = read_prompt_file(args.prompts, args.num)
        if not texts:
            raise ValueError(f"{args.prompts} has no prompt")
        return [Question(text) for text in texts]
    if load_tokenizer(args.model).get_vocab() != tokenizer.TOKEN_IDS:
        raise ValueError(
            "--prompts FILE is needed: the built-in tasks are written in llada-tiny's "
            f"tokens, which {args.model} does not have"
        )
    problems = sample_problems(args.num, args.seed, "train", args.tasks)
    return [
        Question(tokenizer.encode_prompt(problem.question, index % 2 == 0), problem)
        for index, problem in enumerate(problems)
    ]


def ask(
    llm: LLM, args: argparse.Namespace, questions: Sequence[Question], first: int = 0
) -> Iterator[list[Answer]]:
    """Ask an engine, some questions at a time, with a progress bar.

    Args:
        llm: The engine.
        args: Of the command.
        questions: All of them.
        first: How many are answered already.
    """
    from tqdm import tqdm

    with tqdm(total=len(questions), initial=first, unit="prompt") as progress:
        for begin in range(first, len(questions), PART):
            asked = questions[begin : begin + PART]
            sampling = [_sampling(args, begin + index) for index in range(len(asked))]
            prompts: Any = [question.prompt for question in asked]
            if args.chat:
                prompts = [[{"role": "user", "content": text}] for text in prompts]
                results = llm.chat(prompts, sampling, use_tqdm=False)
            else:
                prompts = [
                    text if isinstance(text, str) else {"prompt_token_ids": text}
                    for text in prompts
                ]
                results = llm.generate(prompts, sampling, use_tqdm=False)
            yield [
                Answer(
                    list(result.prompt_token_ids),
                    list(result.outputs[0].token_ids),
                    question.is_right(result.outputs[0].text),
                )
                for question, result in zip(asked, results, strict=True)
            ]
            progress.update(len(asked))


def _sampling(args: argparse.Namespace, number: int) -> SamplingParams:
    from vllm import SamplingParams

    options = {
        "strategy": args.strategy,
        "strategy_config": args.strategy_config,
        "block_length": args.block_length,
    }
    return SamplingParams(
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        # One of its own, so that a run that goes on draws what the whole one would.
        seed=args.seed + number if args.temperature > 0 else None,
        extra_args={"dlm": {name: value for name, value in options.items() if value}},
    )


def _command(args: argparse.Namespace) -> dict[str, Any]:
    """What the answers follow from: another command's are not gone on with."""
    names = ("model", "prompts", "num", "chat", "tasks", "max_tokens", "block_length")
    more = ("strategy", "strategy_config", "temperature", "seed")
    return {name: getattr(args, name) for name in (*names, *more)}


def _row_line(answer: Answer) -> str:
    row = {"prompt_ids": answer.prompt_ids, "response_ids": answer.response_ids}
    return json.dumps(row) + "\n"
