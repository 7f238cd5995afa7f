# SPDX-License-Identifier: Apache-2.0
"""Measure a drafter that `vllm-dlm train deer` has trained and write its card."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tqdm import tqdm

from vllm_dlm.config.aliases import resolve
from vllm_dlm.files.whole_files import write_text
from vllm_dlm.training.block_causal import BlockCausalModel
from vllm_dlm.training.cards import (
    HEAD,
    hardware,
    held_out_prompts,
    megabytes,
    millions,
)
from vllm_dlm.training.drafters.acceptance import Acceptance, measure_acceptance
from vllm_dlm.training.drafters.deer_data import (
    BATCH_ROWS,
    MAX_REFINED,
    STAGE_ONE_SHARE,
    kept_prompts,
)
from vllm_dlm.training.drafters.networks import load_drafter
from vllm_dlm.training.drafters.teacher import (
    Answered,
    end_token_ids,
    generate_answers,
    load_causal_lm,
    load_prompts,
    load_tokenizer,
    read_answers,
)
from vllm_dlm.training.progress import CHECKPOINT, read_progress
from vllm_dlm.training.tiny.llama_modeling import answer_greedy, load_llama

TARGET = "llama-tiny"
"""What a card's command leaves out, and what llama-tiny-draft is compared on."""
CHAIN_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
"""Lengths of the draft model's chains that a drafter is compared with."""

_CARD = """\
A masked-diffusion drafter of {millions:.2f} million parameters ({megabytes:.1f} MB, \
float32) for the autoregressive model `{target}`, in {layout}'s layout. One denoising \
step on a text with up to {block} masks behind it drafts what the target writes next, \
the answer's end included; vLLM verifies. Trained by `vllm-dlm train deer`, a \
reconstruction of DEER (arXiv 2512.15176), whose code is not public.

| | |
|---|---|
| layers / width / heads / MLP | {layers} / {width} / {heads} / {mlp} |
| mask / end token ids | {mask_id} / {eos_id} |
| attention | {attention}; logits not shifted |

## Training

- Data: the target's greedy answers to {num_prompts} prompts ({source}).
- Command: `{command}`: seed {seed}, {steps} steps of {rows} rows, the last {refining} \
of them stage II.
- Stage I: the answer is cut at a random place; half of the rows have everything \
behind the cut masked, the others a random share t of it, weighted 1 / t. Stage II: \
the last R = 1 to {max_refined} tokens of the answer are masked, the mask i of R \
weighted {alpha}^(R - i). No separator token: behind the text there are only masks.
- Time: {minutes:.0f} minutes on {hardware}, bf16 autocast, without the time that the \
target took for its answers.

## Accepted drafts

Greedy speculative decoding of {num_problems} {measured_on}, played in plain PyTorch \
against the target's own answers. A round is one forward of the target that verifies a \
draft; the forward that reads a prompt drafts nothing and counts in the last column. \
Drafted tokens behind an answer's end are not counted.

| drafter | forwards of the drafter per round | accepted per round | drafted tokens \
accepted | tokens per forward of the target |
|---|---|---|---|---|
{rows_of_table}

The answers have {mean_length:.1f} tokens on average, which bounds what can be accepted.
"""


def write_card(args: argparse.Namespace) -> str:
    """Measure what `vllm-dlm train deer` has trained and write README.md there.

    Args:
        args: The command's arguments.

    Returns:
        The table of accepted drafts in Markdown.
    """
    folder = Path(args.output_dir)
    drafter = load_drafter(folder)
    network = drafter.network
    layout, attention = "LLaDA", "both ways over text and masks"
    if isinstance(network, BlockCausalModel):
        block = network.config.dlm_block_length
        layout, attention = "SDAR", f"block-causal, blocks of {block} tokens"
    state = read_progress(folder / CHECKPOINT)
    kept = read_answers(folder / "answers.json")
    target = load_causal_lm(args.target, args.device)
    if args.prompts is None:
        prompts = held_out_prompts(args.num_problems)
    else:
        # The first ones are those that were kept out of the training.
        tokenizer = load_tokenizer(args.target)
        prompts = load_prompts(args.prompts, tokenizer, args.num_prompts, args.seed)
        prompts = prompts[: kept_prompts(len(prompts))]
    answered = generate_answers(target, prompts, max_tokens=args.max_tokens)

    own = _batched(partial(drafter.draft, width=args.block_length))
    lines = [
        _row(f"this, {args.block_length} masks", "1", measure_acceptance(own, answered))
    ]
    if args.target == TARGET:
        lines += _chain_rows(answered)
    command = "vllm-dlm train deer"
    if args.target != TARGET:
        command += f" --target {args.target}"
    if args.drafter is not None:
        command += f" --drafter {args.drafter}"
    elif isinstance(network, BlockCausalModel):
        command += f" --attention-block {network.config.dlm_block_length}"
    if args.prompts is not None:
        command += f" --prompts {Path(args.prompts).name}"
    shape = network.shape
    steps = state.step
    card = HEAD.format(
        pipeline="",
        tags=f"diffusion-language-model, masked-diffusion, {layout.lower()}, "
        "speculative-decoding",
        name=folder.resolve().name,
    ) + _CARD.format(
        alpha=args.alpha,
        attention=attention,
        block=args.block_length,
        command=command,
        eos_id=end_token_ids(target)[0],
        hardware=hardware(),
        heads=shape.n_heads,
        layers=shape.n_layers,
        layout=layout,
        mask_id=drafter.mask_id,
        max_refined=MAX_REFINED,
        mean_length=sum(map(len, answered.answers)) / len(answered.answers),
        measured_on="held-out problems" if args.prompts is None else "kept prompts",
        megabytes=megabytes(folder),
        millions=millions(network),
        minutes=state.seconds / 60,
        mlp=shape.mlp_hidden_size,
        num_problems=len(prompts),
        num_prompts=len(kept.prompts),
        refining=steps - round(STAGE_ONE_SHARE * steps),
        rows=BATCH_ROWS,
        rows_of_table="\n".join(lines),
        seed=state.seed,
        source="llada-tiny's tasks, no held-out question"
        if args.prompts is None
        else Path(args.prompts).name,
        steps=steps,
        target=args.target,
        width=shape.d_model,
    )
    write_text(folder / "README.md", card)
    return "\n".join(lines)


def _chain_rows(answered: Answered) -> list[str]:
    chain = load_llama(resolve("llama-tiny-draft"))
    rows = []
    for length in tqdm(CHAIN_LENGTHS, desc="chains"):
        draft = _batched(partial(answer_greedy, chain, max_tokens=length))
        title = f"llama-tiny-draft, chains of {length}"
        rows.append(_row(title, str(length), measure_acceptance(draft, answered)))
    return rows


def _batched(
    draft: Callable[[list[list[int]]], list[list[int]]],
) -> Callable[[list[list[int]]], list[list[int]]]:
    def batched(prefixes: list[list[int]]) -> list[list[int]]:
        drafts = []
        for first in range(0, len(prefixes), 64):
            drafts += draft(prefixes[first : first + 64])
        return drafts

    return batched


def _row(title: str, forwards: str, acceptance: Acceptance) -> str:
    return (
        f"| {title} | {forwards} | {acceptance.accepted_per_round:.2f} "
        f"| {100 * acceptance.share_accepted:.1f} % "
        f"| {acceptance.tokens_per_forward:.2f} |"
    )
