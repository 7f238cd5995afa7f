# SPDX-License-Identifier: Apache-2.0
"""Train a model to draft for itself behind pad tokens: `vllm-dlm train lud MODEL`.

LUD (lexical unit decoding, arXiv 2405.15208), reconstructed from its description: no
code and no weights are public. The first term of the loss keeps the model's texts what
they were; by the second it learns from them to predict several tokens at once behind
appended pads (`lud_rows`). Served with the method `lud`, which verifies.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_dlm.files.model_folders import Config
from vllm_dlm.files.whole_files import write_text
from vllm_dlm.spec_decode.options import MAX_DRAFT
from vllm_dlm.training.arguments import trained
from vllm_dlm.training.causal_options import (
    CausalOptions,
    add_causal_arguments,
    uncompiled,
)
from vllm_dlm.training.drafters.acceptance import Acceptance, measure_acceptance
from vllm_dlm.training.drafters.teacher import Answered, load_tokenizer, pad_right
from vllm_dlm.training.loop import LoopOptions, prepare, run_steps

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from vllm_dlm.training.causal import Task

NAME = "lud-tiny"
KEY = "lud"
"""Entry of config.json that the method `lud` reads."""
STEPS = 600
TOKENS = 7
GROUPS = 6
ALPHA = 0.5

_CARD = """\
# {name}, trained to draft for itself

`{model}`, fine-tuned by `vllm-dlm train lud` to predict several tokens behind \
appended `{pad}` tokens: a reconstruction of LUD (arXiv 2405.15208), whose code and \
weights are not public.

```bash
vllm serve {folder} --speculative-config \\
    '{{"method": "lud", "num_speculative_tokens": {drafted}}}'
```

{steps} steps of {batch} answers of `{model}` itself, {groups} places of each with \
{tokens} pads, alpha {alpha}. On {shown} prompts that were kept out of the training, \
greedily:

| | |
|---|--:|
| tokens per verifying forward | {per_round:.2f} |
| tokens per forward, those that draft counted too | {per_forward:.2f} |
| drafts accepted | {accepted:.0f} % |
| answers that are those of `{model}` | {same:.1f} % |
{tasks}"""


def train(
    output_dir: str | Path,
    options: LoopOptions,
    what: CausalOptions,
    *,
    tokens: int = TOKENS,
    groups: int = GROUPS,
    alpha: float = ALPHA,
    pad_token: str | None = None,
) -> bool:
    """Train a model and write it to `output_dir`; False if stopped before.

    Args:
        output_dir: Folder of the model, of the answers and of the checkpoint.
        options: How to run.
        what: What to train, and on what.
        tokens: Pads behind a text. Served, a draft has one token more.
        groups: Places of an answer that a step teaches.
        alpha: Least probability of a token of a lexical unit.
        pad_token: A token that occurs in no text; None: the tokenizer's mask token, or
            a padding token that ends no text.

    Raises:
        ValueError: models or prompts that do not fit, or a value out of its range.
    """
    for name, value, most in (
        ("tokens", tokens, MAX_DRAFT - 1),
        ("groups", groups, 64),
    ):
        if not 1 <= value <= most:
            raise ValueError(f"{name} must be from 1 to {most}, not {value}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, not {alpha}")
    prepare(options)
    import torch
    import torch.nn.functional as F

    from vllm_dlm.training.causal import distillation_loss, in_evaluation, load_task
    from vllm_dlm.training.drafters.lud_rows import unit_weights, with_pads

    pad_id = pad_token_id(what.model, pad_token)
    task = load_task(what, output_dir, seed=options.seed, reuse=options.resume)
    network, teacher = task.network, task.teacher

    def step_loss(forward: Callable[..., Any], step: int) -> torch.Tensor:
        seed = f"lud-{options.seed}-{step}"
        rows = task.batch(seed, what.batch_rows)
        padded = with_pads(rows, pad_id, groups, tokens, seed)
        with torch.autocast(network.device.type, torch.bfloat16):
            with torch.no_grad():
                taught = teacher(rows.ids, use_cache=False).logits
            logits = forward(
                padded.ids,
                attention_mask=padded.mask,
                position_ids=padded.positions,
                use_cache=False,
            ).logits
        shifted = taught[:, :-1].float().log_softmax(-1)
        known = shifted.gather(2, rows.ids[:, 1:, None])[..., 0].exp()
        weights = unit_weights(F.pad(known, (1, 0)), padded.targets, rows.ends, alpha)
        places = padded.targets.clamp(max=rows.ids.shape[1] - 1)
        wanted = rows.ids.gather(1, places.flatten(1))
        losses = F.cross_entropy(
            padded.of_pads(logits).float().flatten(0, 2),
            wanted.flatten(),
            reduction="none",
        )
        pads = (losses * weights.flatten()).sum() / weights.sum().clamp(min=1)
        return distillation_loss(logits, taught, rows.predicts) + pads

    def evaluate(step: int) -> dict[str, float]:
        found, same = in_evaluation(network, lambda: measure(task, pad_id, tokens))
        return {"tokens per forward": found.tokens_per_forward, "all": same}

    done = run_steps(
        output_dir, uncompiled(options), network, step_loss, evaluate, scale=what.scale
    )
    if done:
        task.save(output_dir, {KEY: {"pad_token_id": pad_id, "tokens": tokens}})
    return done


def write_card(args: argparse.Namespace) -> str:
    """Measure the model of a training that is over; write and return its card."""
    from vllm_dlm.training.causal import load_trained, tasks_right

    what, folder = CausalOptions.from_args(args), Path(args.output_dir)
    task = load_trained(what, folder, seed=args.seed)
    said = Config(folder).values[KEY]
    pad_id, tokens = said["pad_token_id"], said["tokens"]
    found, same = measure(task, pad_id, tokens)
    after = tasks_right(task.network, args.num_problems)
    before = tasks_right(task.teacher, args.num_problems)
    about = ""
    if after is not None and before is not None:
        about = (
            f"| {args.num_problems} held-out problems right, without drafts | "
            f"{100 * after:.1f} % (before the training {100 * before:.1f} %) |\n"
        )
    card = _CARD.format(
        name=folder.name,
        model=what.model,
        folder=folder,
        pad=load_tokenizer(what.model).convert_ids_to_tokens(pad_id),
        drafted=tokens + 1,
        steps=args.steps,
        batch=what.batch_rows,
        groups=args.groups,
        tokens=tokens,
        alpha=args.alpha,
        shown=len(task.shown.prompts),
        per_round=found.tokens_per_forward,
        per_forward=found.tokens / (2 * found.rounds + found.answers),
        accepted=100 * found.share_accepted,
        same=100 * same,
        tasks=about,
    )
    write_text(folder / "README.md", card)
    return card


def pad_token_id(model: str, pad_token: str | None) -> int:
    """Id of the token that is appended.

    Args:
        model: Folder, hub id or alias.
        pad_token: Its text; None: the mask token, or a padding token of its own.

    Raises:
        ValueError: the tokenizer has none.
    """
    known = load_tokenizer(model)
    vocabulary = known.get_vocab()
    if pad_token is not None:
        if pad_token not in vocabulary:
            raise ValueError(f"--pad-token: {model} has no token {pad_token!r}")
        return int(vocabulary[pad_token])
    for token in (known.mask_token, known.pad_token):
        if token is not None and token not in (known.eos_token, known.bos_token):
            return int(vocabulary[token])
    raise ValueError(
        f"{model} has no mask token and no padding token of its own: name a token that "
        "occurs in no text with --pad-token"
    )


def draft(
    network: PreTrainedModel, prefixes: list[list[int]], pad_id: int, tokens: int
) -> list[list[int]]:
    """`tokens` + 1 tokens behind each prefix, from one forward, greedily."""
    import torch

    ids, _ = pad_right([prefix + [pad_id] * tokens for prefix in prefixes])
    ends = torch.tensor([len(prefix) for prefix in prefixes])
    columns = ends[:, None] - 1 + torch.arange(tokens + 1)
    with torch.inference_mode():
        logits = network(ids.to(network.device), use_cache=False).logits.cpu()
    return logits.argmax(-1).gather(1, columns).tolist()


def measure(task: Task, pad_id: int, tokens: int) -> tuple[Acceptance, float]:
    """How far the network follows its own drafts, and the teacher's answers."""
    from vllm_dlm.training.causal import agreement, plain_answers

    answers = plain_answers(task.network, task.shown)
    own = Answered(task.shown.prompts, answers)

    def drafts(prefixes: list[list[int]]) -> list[list[int]]:
        return draft(task.network, prefixes, pad_id, tokens)

    return measure_acceptance(drafts, own), agreement(answers, task.shown)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vllm-dlm train lud`."""
    add_causal_arguments(parser, output_dir=NAME, steps=STEPS)
    parser.add_argument(
        "--tokens",
        type=int,
        default=TOKENS,
        help="pads behind a text; served, a draft has one token more",
    )
    parser.add_argument(
        "--groups",
        type=int,
        default=GROUPS,
        help="places of each answer that a step teaches",
    )
    parser.add_argument(
        "--alpha",
        type=float,
        default=ALPHA,
        help="least probability of a token of a lexical unit; no pad behind a less "
        "probable token is taught (0: all are)",
    )
    parser.add_argument(
        "--pad-token",
        help="a token that occurs in no text; by default the tokenizer's mask token, "
        "or its padding token if that does not end a text",
    )


def run(args: argparse.Namespace) -> None:
    """Train the model, export it and write its card."""

    def go_on() -> bool:
        return train(
            args.output_dir,
            LoopOptions.from_args(args),
            CausalOptions.from_args(args),
            tokens=args.tokens,
            groups=args.groups,
            alpha=args.alpha,
            pad_token=args.pad_token,
        )

    if trained(args, go_on):
        print(write_card(args))
