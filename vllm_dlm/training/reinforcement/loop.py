# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning: roll out, reward, compare within groups, update.

A step of the run asks some questions, has each answered several times, and makes
`--inner-updates` updates of what these answers earned. What a recipe adds is which
tokens it scores on which canvases (`Objective`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_dlm.training.recipes.command import Recipe, Setting, Training
from vllm_dlm.training.reinforcement.options import (
    add_arguments,
    check,
    decoder_of,
    evaluated_decoders,
)
from vllm_dlm.training.reinforcement.questions import (
    Question,
    read_questions,
    task_questions,
)
from vllm_dlm.training.reinforcement.rewards import Reward, load_reward
from vllm_dlm.training.reinforcement.rollers import Roller, TrainerRoller
from vllm_dlm.training.rows import rows_of_step, step_generator, step_seed

if TYPE_CHECKING:
    import torch

    from vllm_dlm.training.learner import Learner
    from vllm_dlm.training.reinforcement.policy import Baseline, Term
    from vllm_dlm.training.reinforcement.rollout_rows import RollOuts
    from vllm_dlm.training.reinforcement.rollouts import LogitsAt


@dataclass(frozen=True)
class Scored:
    """Answers with their advantages, for a recipe to score.

    Args:
        rollouts: R rows.
        advantage: [R].
        tokens: [R, L] bool: those that count.
        kept: [R] bool: rows whose group has rewards that differ.
        rows_at_once: Rows that go through the network at once; None: all.
    """

    rollouts: RollOuts
    advantage: torch.Tensor
    tokens: torch.Tensor
    kept: torch.Tensor
    rows_at_once: int | None


Objective = Callable[["argparse.Namespace", Scored, "torch.Generator"], "list[Term]"]
"""(options, answers, generator of the inner update) -> terms of the loss."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """What sets one recipe of reinforcement learning apart.

    Args:
        objective: Terms of an inner update.
        redraws: Whether each inner update has masks of its own.
        baseline: Of the advantages.
        against_old: Whether the divergence is from the network before the inner
            updates, not from that before the training.
    """

    objective: Objective
    redraws: bool
    baseline: Baseline
    against_old: bool = False


@dataclass
class Run(Sequence[Question]):
    """What a run keeps from step to step: the questions to train on, and more.

    Args:
        questions: To train on.
        held_out: To measure with.
        reward: Of an answer.
        roller: Rolls out.
    """

    questions: Sequence[Question]
    held_out: Sequence[Question]
    reward: Reward
    roller: Roller

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: Any) -> Any:
        return self.questions[index]


def read(args: argparse.Namespace, learner: Learner) -> Run:
    """The questions and the reward that the options name, and who rolls out."""
    check(args)
    if args.data is not None:
        found = read_questions(args.data, learner.tokenizer, args.prompt_length)
        if args.held_out >= len(found):
            raise ValueError(
                f"--held-out {args.held_out} leaves nothing to train on of the "
                f"{len(found)} questions of {args.data}"
            )
        questions = found[: len(found) - args.held_out]
        held_out = found[len(questions) :]
    else:
        from vllm_dlm.tasks.tokenizer import TOKEN_IDS

        if learner.tokenizer.get_vocab() != TOKEN_IDS:
            raise ValueError(
                "the built-in tasks are written in llada-tiny's tokens, which "
                f"{args.model} does not have; pass a .jsonl file with --data"
            )
        tasks = args.tasks.split(",") if args.tasks else None
        questions = task_questions(args.num_rows, args.seed, tasks)
        held_out = task_questions(args.held_out, args.seed, tasks, "heldout")
    decoder_of(args).strategy(args.canvas_length, learner.device)
    return Run(
        questions=questions,
        held_out=held_out,
        reward=load_reward(args.reward),
        roller=_roller(args, learner),
    )


def _roller(args: argparse.Namespace, learner: Learner) -> Roller:
    decoder, canvas = decoder_of(args), args.canvas_length
    if args.rollouts == "trainer":
        return TrainerRoller(learner, decoder, canvas, args.rollout_rows)
    from vllm_dlm.training.reinforcement.engine_rollouts import (
        EngineRoller,
        start_engine,
    )

    return EngineRoller(
        start_engine(learner, args.engine_config), learner, decoder, canvas
    )


def updates(
    method: Method, training: Training, step: int
) -> Iterator[Mapping[str, float]]:
    """The updates of a step, as of `loop.run_updates`: gradients, then measures."""
    from vllm_dlm.training.reinforcement import policy

    args, learner = training.args, training.learner
    run = training.rows
    assert isinstance(run, Run)
    questions = rows_of_step(run.questions, args.batch_size, training.seed, step)
    asked = [each for each in questions for _ in range(args.generations)]
    own = step_seed(training.seed, step)
    rollouts = run.roller(
        [question.prompt_ids for question in asked],
        [step_seed(own, row) for row in range(len(asked))],
    )
    rewards = reward_answers(run.reward, learner, asked, rollouts)
    equal = policy.equal_groups(rewards, args.generations)
    measures: dict[str, float] = {
        "reward": float(rewards.mean()),
        "equal groups": float(equal.float().mean()),
        "forwards": rollouts.num_steps,
    }
    if rollouts.first_entropy is not None:
        measures["first entropy"] = float(rollouts.first_entropy.mean())
    if step % args.measure_steps == 0:
        measures |= measure(training)
    scored = Scored(
        rollouts,
        policy.advantages(rewards, args.generations, method.baseline),
        _tokens(args, rollouts, learner.end_id),
        ~equal.repeat_interleave(args.generations),
        -(-len(asked) // args.accumulate),
    )
    if equal.all():
        # No gradients: the update changes nothing.
        yield {"loss": 0.0, **measures}
        return
    generator = step_generator(own, len(asked))
    reference = _reference(method, training)
    all_terms = []
    for number in range(args.inner_updates):
        if number == 0 or method.redraws:
            terms = method.objective(args, scored, generator)
            policy.refer(terms, learner.logits_at, reference, first=number == 0)
        all_terms.append(terms)
    for terms in all_terms:
        loss = policy.backward(terms, learner.logits_at, args.epsilon)
        yield {"loss": loss, **measures}


def _tokens(args: argparse.Namespace, rollouts: RollOuts, end_id: int) -> torch.Tensor:
    written = rollouts.steps >= 0
    return written & rollouts.to_end(end_id) if args.until_end else written


def _reference(
    method: Method, training: Training
) -> Callable[[], AbstractContextManager[LogitsAt]] | None:
    """What makes the network of before the training; None where nobody asks for it."""
    if training.args.beta == 0 or method.against_old:
        return None

    @contextmanager
    def initial() -> Iterator[LogitsAt]:
        with training.initial() as learner:
            yield learner.logits_at

    return initial


def reward_answers(
    reward: Reward, learner: Learner, asked: Sequence[Question], rollouts: RollOuts
) -> torch.Tensor:
    """[R]: the reward of each answer's text, on the learner's device."""
    import torch

    texts = [
        str(learner.tokenizer.decode(ids, skip_special_tokens=True))
        for ids in rollouts.answers(learner.end_id)
    ]
    values = reward(
        [question.prompt for question in asked],
        texts,
        [question.record for question in asked],
    )
    return torch.tensor(values, device=learner.device)


def measure(training: Training) -> dict[str, float]:
    """Held-out reward and forwards, greedily, by each decoder; entropy at first."""
    args, learner, run = training.args, training.learner, training.rows
    assert isinstance(run, Run)
    found: dict[str, float] = {}
    if not run.held_out:
        return found
    for name, decoder in evaluated_decoders().items():
        if learner.attention_block is not None:
            from dataclasses import replace

            decoder = replace(decoder, block_length=learner.attention_block)
        roller = TrainerRoller(
            learner, decoder, args.canvas_length, args.rollout_rows, stop_at_end=True
        )
        prompts = [question.prompt_ids for question in run.held_out]
        rollouts = roller(prompts, [0] * len(prompts))
        rewards = reward_answers(run.reward, learner, run.held_out, rollouts)
        forwards = rollouts.steps.amax(1) + 1
        found[f"reward, {name}"] = float(rewards.mean())
        found[f"forwards, {name}"] = float(forwards.float().mean())
        if rollouts.first_entropy is not None:
            found["held-out first entropy"] = float(rollouts.first_entropy.mean())
    return found


def make_recipe(
    method: Method,
    *,
    name: str,
    summary: str,
    paper: str,
    defaults: Mapping[str, Any],
    more_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> Recipe:
    """A recipe of reinforcement learning, with the options that these share."""

    def add(parser: argparse.ArgumentParser) -> None:
        add_arguments(parser)
        more_arguments(parser)

    return Recipe(
        name=name,
        summary=summary,
        paper=paper,
        updates=lambda training, step: updates(method, training, step),
        read=read,
        decoding=lambda args: decoder_of(args).options(args.canvas_length),
        settings=lambda args: [
            Setting(name, decoder.options(args.canvas_length))
            for name, decoder in evaluated_decoders().items()
        ],
        add_arguments=add,
        defaults={
            "batch_size": 6,
            "betas": (0.9, 0.99),
            "weight_decay": 0.0,
            "max_norm": 0.2,
            "learning_rate": 5e-4,
            **defaults,
        },
    )
