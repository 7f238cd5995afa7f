# SPDX-License-Identifier: Apache-2.0
"""Find how far a tuned model is steered: `vllm-dlm train steer-mu`.

SVDecode (arXiv 2509.15888). Prompts and right answers are read by the tuned model and
by its base; nothing is trained. `mean` is the paper's constant: at each answer token
the mu that leads to it, to first order, and the mean of those over all tokens that the
share `keep` keeps. Where the two models hardly differ such a mu may be anything, and
outliers decide the mean. So `likelihood` is offered beside it: the mu on a grid under
which the answers are most probable.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_dlm.cli.arguments import count, output_file
from vllm_dlm.files.whole_files import write_json
from vllm_dlm.steering.options import KEEP, Constant
from vllm_dlm.steering.tokens import refuse_other_tokens
from vllm_dlm.tasks.tokenizer import TOKEN_IDS
from vllm_dlm.training.loop import LoopOptions, prepare
from vllm_dlm.training.rows import FORMS, Row, read_rows, task_rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FITS = ("mean", "likelihood")
GRID = [step / 8 for step in range(-64, 65)]
"""Values of mu whose likelihood is measured."""
CHUNK = 512
"""Positions whose distributions are held at a time."""


@dataclass(frozen=True)
class Calibration:
    """What was found."""

    rows: int
    tokens: int
    """Tokens of the answers, their end tokens included."""
    kept: int
    """Those that serving could write; everything below is of them."""
    mean: float
    standard_error: float
    """Of the mean."""
    median: float
    losses: list[float]
    """For each mu of `GRID` the mean cross-entropy, in nats."""

    @property
    def likelihood(self) -> float:
        """The mu of the grid with the least loss."""
        return GRID[min(range(len(GRID)), key=self.losses.__getitem__)]

    def loss(self, mu: float) -> float:
        """The loss at any mu, between its neighbours on the grid."""
        import numpy as np

        return float(np.interp(mu, GRID, self.losses))


def calibrate(
    tuned: PreTrainedModel,
    base: PreTrainedModel,
    rows: Sequence[Row],
    *,
    keep: float = KEEP,
    batch_rows: int = 8,
) -> Calibration:
    """Read all rows with both models, with a progress bar.

    Args:
        tuned: the tuned model.
        base: the model that it was tuned from.
        rows: prompts and answers.
        keep: as in serving: share of the best probability that a token needs.
        batch_rows: rows of a forward.

    Raises:
        ValueError: a row is too long for a model; or no token is kept.
    """
    import torch
    from tqdm import tqdm

    _check_lengths(rows, tuned, base)
    by_length = sorted(rows, key=lambda row: row.length)
    found: list[torch.Tensor] = []
    losses = torch.zeros(len(GRID), dtype=torch.float64)
    with tqdm(total=len(rows), desc="answers", unit="row") as progress:
        for first in range(0, len(rows), batch_rows):
            part = by_length[first : first + batch_rows]
            pieces = (each.split(CHUNK) for each in _predicted(tuned, base, part))
            for p, q, tokens in zip(*pieces, strict=True):
                mus, loss = _measure(p, q, tokens, keep)
                found.append(mus)
                losses += loss
            progress.update(len(part))
    mus = torch.cat(found).double()
    if not len(mus):
        raise ValueError(
            f"with keep {keep} no token of the answers could be written: lower --keep, "
            "or check that the answers are this model's"
        )
    return Calibration(
        rows=len(rows),
        tokens=sum(len(row.response_ids) for row in rows),
        kept=len(mus),
        mean=mus.mean().item(),
        standard_error=(mus.std(correction=0) / len(mus) ** 0.5).item(),
        median=mus.median().item(),
        losses=(losses / len(mus)).tolist(),
    )


def _check_lengths(rows: Sequence[Row], *models: PreTrainedModel) -> None:
    longest = max(row.length for row in rows)
    for model in models:
        most = getattr(model.config, "max_position_embeddings", None)
        if most is not None and longest > most:
            raise ValueError(
                f"a row has {longest} tokens, and {model.name_or_path} reads {most}: "
                "leave long rows out"
            )


def _predicted(
    tuned: PreTrainedModel, base: PreTrainedModel, rows: Sequence[Row]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [N, V] of both models at the rows' answer tokens, and those tokens [N]."""
    import torch

    from vllm_dlm.training.drafters.teacher import pad_right

    ids, valid = pad_right([row.prompt_ids + row.response_ids for row in rows])
    starts = torch.tensor([len(row.prompt_ids) for row in rows])
    answers = (torch.arange(1, ids.shape[1]) >= starts[:, None]) & valid[:, 1:]
    logits = []
    for model in (tuned, base):
        device = model.device
        with torch.inference_mode():
            output = model(
                input_ids=ids.to(device), attention_mask=valid.long().to(device)
            )
        logits.append(output.logits[:, :-1][answers.to(device)])
    return logits[0], logits[1], ids[:, 1:][answers].to(logits[0].device)


def _measure(
    tuned: torch.Tensor, base: torch.Tensor, tokens: torch.Tensor, keep: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best mu of each kept token, and for each mu of the grid the summed loss.

    Both on the CPU.
    """
    import torch

    from vllm_dlm.steering.rule import best_mu, direction, is_kept

    log_p, log_q = (each.float().log_softmax(-1) for each in (tuned, base))
    may = is_kept(log_p, keep)
    kept = may.gather(1, tokens[:, None])[:, 0]
    log_p, log_q, may, tokens = (each[kept] for each in (log_p, log_q, may, tokens))
    delta = direction(log_p, log_q)
    free = log_p.masked_fill(~may, -torch.inf)
    own, way = (each.gather(1, tokens[:, None])[:, 0] for each in (log_p, delta))
    losses = [
        ((free + mu * delta).logsumexp(-1) - (own + mu * way)).double().sum().cpu()
        for mu in GRID
    ]
    return best_mu(log_p, log_q, tokens).cpu(), torch.stack(losses)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vllm-dlm train steer-mu`."""
    parser.add_argument(
        "--tuned",
        default="llama-tiny",
        help="the model that will be served: folder, hub id or alias",
    )
    parser.add_argument(
        "--base",
        default="llama-tiny-draft",
        help="the model that it was tuned from: folder, hub id or alias",
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        help=f".jsonl file of prompts and right answers: {'; '.join(FORMS)} (by "
        "default problems of the built-in tasks, for models with llama-tiny's "
        "tokenizer)",
    )
    parser.add_argument(
        "--num", type=count, default=1000, help="most rows (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=output_file,
        default="steer_mu.json",
        help="file for --dlm-steer-mu (default: %(default)s)",
    )
    parser.add_argument(
        "--keep",
        type=float,
        default=KEEP,
        help="as in serving: share of the best probability that a token needs "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--fit",
        choices=FITS,
        default=FITS[0],
        help="mean: the paper's constant; likelihood: under which the answers are most "
        "probable (default: %(default)s)",
    )
    parser.add_argument("--batch-rows", type=count, default=8, help="rows of a forward")
    parser.add_argument("--seed", type=int, default=1, help="of the built-in problems")
    parser.add_argument(
        "--device", default="cpu", help="of both models, as PyTorch names it (cpu)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of both models' weights (default: %(default)s)",
    )
    parser.add_argument("--threads", type=count, help="CPU threads")


def run(args: argparse.Namespace) -> None:
    """Calibrate, tell what was found, and write it to the file.

    Raises:
        ValueError: models or rows that do not fit, or a value out of its range.
    """
    if not 0 <= args.keep <= 1:
        raise ValueError(f"--keep must be from 0 to 1, not {args.keep}")
    prepare(LoopOptions(steps=1, seed=args.seed, threads=args.threads))
    from vllm_dlm.training.drafters.teacher import load_causal_lm, load_tokenizer

    tokenizer, base_tokenizer = map(load_tokenizer, (args.tuned, args.base))
    rows = _rows(args, tokenizer, base_tokenizer)
    tuned, base = (
        load_causal_lm(name, args.device, args.dtype)
        for name in (args.tuned, args.base)
    )
    found = calibrate(tuned, base, rows, keep=args.keep, batch_rows=args.batch_rows)
    mu = getattr(found, args.fit)
    constant = Constant(
        mu=mu,
        keep=args.keep,
        tuned=args.tuned,
        base=args.base,
        fit=args.fit,
        tokens=found.tokens,
        kept=found.kept,
    )
    write_json(args.output, constant.model_dump())
    print(report(found, args.keep))
    print(f"mu {mu:.4g} (--fit {args.fit}) -> {args.output}")


def _rows(args: argparse.Namespace, tokenizer: Any, base_tokenizer: Any) -> list[Row]:
    tokens = tokenizer.get_vocab()
    refuse_other_tokens(args.tuned, tokens, args.base, base_tokenizer.get_vocab())
    if args.data is not None:
        return read_rows(args.data, tokenizer)[: args.num]
    if tokens != TOKEN_IDS:
        raise ValueError(
            "--data FILE is needed: the built-in tasks are written in llama-tiny's "
            f"tokens, which {args.tuned} does not have"
        )
    return task_rows(args.num, args.seed)


def report(found: Calibration, keep: float) -> str:
    """What was found, for people."""
    mean, likelihood = found.mean, found.likelihood
    text = (
        f"{found.tokens} answer tokens of {found.rows} rows, {found.kept} of them kept "
        f"(at least {keep:g} of the best probability)\n"
        f"mean: mu {mean:.4g} +- {found.standard_error:.2g}, "
        f"median {found.median:.4g}\n"
        f"likelihood: mu {likelihood:g} of {GRID[0]:g} ... {GRID[-1]:g}\n"
        f"loss of these tokens: {found.loss(0):.4f} nats without steering, "
        f"{found.loss(mean):.4f} with the mean, {found.loss(likelihood):.4f} with the "
        "likeliest"
    )
    if found.loss(mean) > found.loss(0):
        text += (
            "\nThe mean makes these answers less probable than no steering does: look "
            "at --fit likelihood, and at accuracy, before you serve with it."
        )
    return text
