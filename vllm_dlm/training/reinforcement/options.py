# SPDX-License-Identifier: Apache-2.0
"""The options that all recipes of reinforcement learning share."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from vllm_dlm.cli.arguments import count
from vllm_dlm.training.reinforcement.rewards import REWARDS

if TYPE_CHECKING:
    from vllm_dlm.training.reinforcement.rollouts import Decoder

DECODER_NAMES = ("static", "eoser", "ass", "eoser-ass", "threshold", "entropy")
DEFAULT_CANVAS = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that all recipes of reinforcement learning share."""
    data = parser.add_argument_group("questions and rewards")
    data.add_argument(
        "--reward",
        default="tasks",
        metavar="NAME",
        help=f"{', '.join(REWARDS)}, or FILE.py:NAME, a function reward(prompts, "
        "texts, records) that returns a number for each text",
    )
    data.add_argument(
        "--tasks",
        help="names of built-in tasks, with commas between, where there is no --data",
    )
    data.add_argument(
        "--prompt-length",
        type=count,
        help="most tokens of a prompt of --data; longer ones lose their first",
    )
    data.add_argument(
        "--held-out",
        type=int,
        default=64,
        metavar="N",
        help="questions that measure, and are not trained on: built-in ones, or the "
        "last of --data",
    )
    data.add_argument(
        "--measure-steps",
        type=count,
        default=25,
        metavar="N",
        help="steps between two measures with held-out questions",
    )
    group = parser.add_argument_group("roll-outs")
    group.add_argument(
        "--generations", type=count, default=8, help="answers to each question"
    )
    group.add_argument(
        "--decoder",
        choices=DECODER_NAMES,
        default="static",
        help="how they are decoded",
    )
    group.add_argument(
        "--decoder-config",
        type=_parameters,
        default={},
        metavar="JSON",
        help="parameters of its strategy, as --dlm-strategy-config",
    )
    group.add_argument(
        "--tokens-per-step",
        type=count,
        help="of the decoders static and eoser, which follow a schedule (4 and 1)",
    )
    group.add_argument(
        "--block-length", type=count, help="of a block; by default the whole canvas"
    )
    group.add_argument(
        "--temperature", type=float, default=1.0, help="of the draws, above 0"
    )
    group.add_argument(
        "--rollout-rows", type=count, help="answers rolled out at once; by default all"
    )
    group.add_argument(
        "--rollouts",
        choices=("trainer", "engine"),
        default="trainer",
        help="by the network itself, or by an engine that gets its weights before each "
        "step's roll-outs",
    )
    group.add_argument(
        "--engine-config",
        type=_parameters,
        default={},
        metavar="JSON",
        help="arguments of that engine, as of vllm_dlm.LLM",
    )
    update = parser.add_argument_group("updates")
    update.add_argument(
        "--inner-updates",
        type=count,
        default=1,
        help="updates that are made of the same answers",
    )
    update.add_argument(
        "--epsilon", type=float, default=0.2, help="ratios are clipped to 1 +- this"
    )
    update.add_argument(
        "--beta",
        type=float,
        default=0.0,
        help="weight of the divergence from the reference",
    )
    update.add_argument(
        "--until-end",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="score tokens up to and with the first end of the text only",
    )


def _parameters(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value


def decoder_of(args: argparse.Namespace) -> Decoder:
    """The decoder of the roll-outs."""
    from vllm_dlm.training.reinforcement.rollouts import Decoder

    tokens = args.tokens_per_step
    if tokens is None and args.decoder == "static":
        tokens = 4
    return Decoder(
        args.decoder,
        args.decoder_config,
        block_length=args.block_length,
        tokens_per_step=tokens,
        temperature=args.temperature,
    )


def check(args: argparse.Namespace) -> None:
    """Refuse options that cannot work, before anything is loaded.

    Raises:
        ValueError: one of them; the message says what could.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "recipes that roll out run in one process: start them without torchrun"
        )
    if args.generations < 2:
        raise ValueError("--generations: answers are compared: 2 or more to a question")
    if args.temperature <= 0:
        raise ValueError(
            "--temperature: at 0 all answers to a question are the same, and nothing "
            "is learnt from them: above 0"
        )
    if args.row_length is not None:
        raise ValueError("--row-length: set the answers' --canvas-length instead")
    for name in ("epsilon", "beta"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name}: {getattr(args, name)} is below 0")
    if args.data is not None and args.tasks is not None:
        raise ValueError("either --data or --tasks: these are the built-in questions")
    if args.data is None and args.prompt_length is not None:
        raise ValueError("--prompt-length is of the prompts of --data")
    if args.held_out < 0:
        raise ValueError(f"--held-out: {args.held_out} is below 0")
    if args.rollouts == "trainer" and args.engine_config:
        raise ValueError("--engine-config is for --rollouts engine")
    if args.rollouts == "engine" and args.rollout_rows is not None:
        raise ValueError(
            "--rollout-rows is for roll-outs in the trainer; an engine's is "
            "max_num_seqs of --engine-config"
        )
    if args.canvas_length is None:
        args.canvas_length = DEFAULT_CANVAS
    decoder_of(args)


def evaluated_decoders() -> dict[str, Decoder]:
    """Name -> the decoders that held-out questions are answered by."""
    from vllm_dlm.training.reinforcement.rollouts import Decoder

    return {
        "static 4": Decoder("static", tokens_per_step=4),
        "threshold .9": Decoder("threshold", {"threshold": 0.9}),
        "entropy .5": Decoder("entropy", {"threshold": 0.5}),
    }
