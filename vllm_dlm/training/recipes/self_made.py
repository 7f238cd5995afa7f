# SPDX-License-Identifier: Apache-2.0
"""Data of recipes that learn from a model's own answers.

They come from a file (`vllm-dlm answers` makes one through the engine), or, with the
tokenizer of the built-in tasks, from the network itself before the training begins:
right answers to problems that it is not evaluated on.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_dlm.cli.arguments import count
from vllm_dlm.tasks import tokenizer
from vllm_dlm.tasks.problems import FREE_TASKS, TASKS, sample_problem
from vllm_dlm.training.answer_log import Answer, append_answers, read_answers
from vllm_dlm.training.rows import Row, read_rows

if TYPE_CHECKING:
    from vllm_dlm.training.learner import Learner
    from vllm_dlm.training.recipes.command import Training
    from vllm_dlm.training.reinforcement.rollouts import Decoder

FILE = "answers-{}.jsonl"
"""Its answers of a round, in the output folder."""
FREE_SHARE = 0.8
CANVAS_LENGTH = 32
_BATCH = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of data that the network makes itself."""
    parser.add_argument(
        "--free-share",
        type=float,
        metavar="SHARE",
        help="of the problems that the network answers where there is no --data: share "
        f"of the tasks with several right answers, {', '.join(FREE_TASKS)} "
        f"(default: {FREE_SHARE:g})",
    )


def add_round_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option of data that is made several times."""
    parser.add_argument(
        "--rounds",
        type=count,
        default=1,
        metavar="K",
        help="without --data: in so many equal parts of the training the network "
        "answers new problems, as it is by then (ours; published: 1)",
    )


def read(args: argparse.Namespace, learner: Learner) -> Sequence[Row]:
    """The rows of --data, or the network's own answers to the built-in tasks.

    Raises:
        ValueError: neither can be had, or they do not fit to --rounds.
    """
    rounds = getattr(args, "rounds", 1)
    if rounds > args.steps:
        raise ValueError(f"--rounds {rounds} are more than the {args.steps} steps")
    if args.data is None:
        return rows_of_round(args, learner, 0)
    if rounds > 1:
        raise ValueError(
            "--rounds is for data that the network makes; with --data, run "
            "`vllm-dlm answers` and the training again instead"
        )
    check_no_share(args)
    return read_rows(args.data, learner.tokenizer, learner.end_id)


def check_no_share(args: argparse.Namespace) -> None:
    """Refuse --free-share beside --data.

    Raises:
        ValueError: there are both.
    """
    if args.free_share is not None:
        raise ValueError(
            "--free-share is for data that the network makes; leave it out with --data"
        )


def begin_step(training: Training, step: int) -> None:
    """New answers, if a round begins: by the network as it is before this step."""
    args = training.args
    number = step * args.rounds // args.steps
    if training.kept.get("round", 0) != number:
        training.rows = rows_of_round(args, training.learner, number)
        training.kept["round"] = number


def rows_of_round(
    args: argparse.Namespace, learner: Learner, number: int
) -> Sequence[Row]:
    """Right answers of the network, decoded with `threshold` at 0.99.

    That is nearly what one token per step gives, at a sixth of the forwards.
    """
    from vllm_dlm.training.reinforcement.rollouts import Decoder

    block = learner.attention_block
    decoder = Decoder("threshold", {"threshold": 0.99}, block_length=block)
    return [
        Row(answer.prompt_ids, answer.response_ids)
        for answer in own_answers(args, learner, decoder, number)
    ]


def own_answers(
    args: argparse.Namespace, learner: Learner, decoder: Decoder, number: int = 0
) -> list[Answer]:
    """Right answers of a network to `args.num_rows` problems of the built-in tasks.

    Each round, `number` from 0, has problems of its own.

    They are kept in the output folder, where an interrupted run finds them.

    Raises:
        ValueError: the network has not the tasks' tokenizer, no answer is right, or a
            share is out of its range.
    """
    from tqdm import tqdm

    if learner.tokenizer.get_vocab() != tokenizer.TOKEN_IDS:
        raise ValueError(
            "the built-in tasks are written in llada-tiny's tokens, which "
            f"{args.model} does not have; pass data with --data"
        )
    free_share = FREE_SHARE if args.free_share is None else args.free_share
    if not 0 <= free_share <= 1:
        raise ValueError(f"--free-share is from 0 to 1, not {free_share}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "one process makes the network's own answers: make a file with "
            "`vllm-dlm answers` and pass it with --data"
        )
    file = Path(args.output_dir) / FILE.format(number)
    if not args.resume:
        file.unlink(missing_ok=True)
    canvas = args.canvas_length or CANVAS_LENGTH
    made_by = {
        "model": str(args.model),
        "rows": args.num_rows,
        "seed": args.seed,
        "round": number,
        "free_share": free_share,
        "canvas": canvas,
        "decoder": decoder.options(canvas),
    }
    done = read_answers(file, made_by)
    learner.network.eval()
    with tqdm(total=args.num_rows, initial=len(done), unit="answer") as progress:
        while len(done) < args.num_rows:
            numbers = range(len(done), min(len(done) + _BATCH, args.num_rows))
            answers = _answer(
                args, learner, decoder, canvas, free_share, number, numbers
            )
            append_answers(file, made_by, answers)
            done += answers
            progress.update(len(answers))
    learner.network.train()
    right = [answer for answer in done if answer.right]
    print(f"{len(right)} of {len(done)} of the model's answers are right: {file}")
    if not right:
        raise ValueError("no answer of the model is right, and it learns from these")
    return right


def _answer(
    args: argparse.Namespace,
    learner: Learner,
    decoder: Decoder,
    canvas: int,
    free_share: float,
    round_number: int,
    numbers: range,
) -> list[Answer]:
    """Answers to some problems, which follow from the seed and their numbers alone."""
    from vllm_dlm.training.reinforcement.rollouts import roll_out

    problems, prompts = [], []
    certain = [task for task in TASKS if task not in FREE_TASKS]
    for number in numbers:
        rng = random.Random(f"own-answers-{args.seed}-{round_number}-{number}")
        is_free = rng.random() < free_share
        problem = sample_problem(rng, "train", FREE_TASKS if is_free else certain)
        problems.append(problem)
        prompts.append(tokenizer.encode_prompt(problem.question, number % 2 == 0))
    rows = roll_out(
        learner.logits_at,
        prompts,
        canvas=canvas,
        decoder=decoder,
        mask_id=learner.mask_id,
        end_id=learner.end_id,
        seeds=list(numbers),
        device=learner.device,
        attention_block=learner.attention_block,
        stop_at_end=True,
    )
    is_answer = rows.to_end(learner.end_id)
    answers = []
    for index, (problem, prompt) in enumerate(zip(problems, prompts, strict=True)):
        ids = rows.ids[index, is_answer[index]].tolist()
        answers.append(
            Answer(
                prompt_ids=prompt,
                response_ids=ids,
                right=ids[-1] == learner.end_id
                and problem.check(tokenizer.decode(ids)),
                steps=rows.steps[index, is_answer[index]].tolist(),
            )
        )
    return answers
