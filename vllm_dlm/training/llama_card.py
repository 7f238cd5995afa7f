# SPDX-License-Identifier: Apache-2.0
"""Measure the models of the autoregressive side and write their model cards."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from vllm_dlm.training import deer, deer_data, llama_tiny
from vllm_dlm.training import tasks as tiny_tasks
from vllm_dlm.training import tokenizer as tiny_tokenizer
from vllm_dlm.training.acceptance import Acceptance, measure_acceptance
from vllm_dlm.training.evaluation import exact_match, load_model
from vllm_dlm.training.llama_modeling import LlamaModel, decode_greedy, load_llama
from vllm_dlm.training.model_card import EVALUATION_SEED, accuracy_table, hardware
from vllm_dlm.training.teacher import (
    Answered,
    generate_answers,
    load_causal_lm,
    load_prompts,
    load_tokenizer,
)

CHAIN_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
"""Lengths of the draft model's chains that deer-tiny is compared with."""

_HEAD = """\
---
license: apache-2.0
language: en
{pipeline}tags: [{tags}, vllm-dlm]
---

# {name}

"""

_LLAMA_CARD = """\
A causal Llama of {millions:.2f} million parameters ({megabytes:.1f} MB, float32), \
trained by the vllm-dlm project {purpose}. vLLM and transformers load it as a \
`LlamaForCausalLM`. It has the tokenizer, the chat template and the questions of \
llada-tiny, whose card shows them. It is no chat model: it knows nothing else.

| | |
|---|---|
| layers / width / heads / MLP | {layers} / {width} / {heads} / {mlp} |
| end / begin token ids | {eos_id} / {bos_id} |
| texts it was trained on | up to about 50 tokens, the answer's end included |

## Training

- Data: llada-tiny's problems, drawn at random while training by \
`vllm_dlm.training.tasks`; held-out questions are never among them.
- Command: `vllm-dlm train {name}`, which has these defaults: seed {seed}, {steps} \
steps of {rows} problems, Muon for the layers and AdamW for the rest. The same seed \
gives the same problems; roundings differ between machines, so that a new run ends at \
other weights of similar accuracy.
- Objective: next-token cross-entropy on the answers and their ends{exits}; what \
follows an end is another end, weighted {padding_weight}. Prompts half plain, half chat.
- Time: {minutes:.0f} minutes on {hardware}, bf16 autocast.

## Accuracy

Exact match on {num_problems} held-out problems ({per_task} of each task), half asked \
as plain text and half through the chat template, greedy.

{accuracy}

"all" weights the tasks as the training does.
"""

_EXITS = """
## Exits

The model read out after a layer: the final norm and the head on what that layer hands \
on. "Exact match" writes the whole answer from that layer, over all tasks as above. \
"Agreement" is the share of the last layer's answer tokens that the layer names as \
well, given the same text: what a draft from that layer is accepted by.

{exits}
"""

_DRAFTER_CARD = """\
A masked-diffusion drafter of {millions:.2f} million parameters ({megabytes:.1f} MB, \
float32) for the autoregressive model `{target}`, in LLaDA's layout. One denoising \
step on a text with up to {block} masks behind it drafts what the target writes next, \
the answer's end included; vLLM verifies. Trained by `vllm-dlm train deer`, a \
reconstruction of DEER (arXiv 2512.15176), whose code is not public.

| | |
|---|---|
| layers / width / heads / MLP | {layers} / {width} / {heads} / {mlp} |
| mask / end token ids | {mask_id} / {eos_id} |
| attention | both ways over text and masks; logits not shifted |

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


def write_card(model_dir: str | Path, name: str, num_problems: int) -> str:
    """Measure a Llama in a folder and write README.md there.

    Args:
        model_dir: Folder of the exported model, with `training.pt` beside it.
        name: "llama-tiny" or "llama-tiny-draft".
        num_problems: Held-out problems over all tasks.

    Returns:
        The tables in Markdown.
    """
    model_dir = Path(model_dir)
    model = load_llama(model_dir)
    state = torch.load(model_dir / "training.pt", weights_only=True)
    per_task = max(1, num_problems // len(tiny_tasks.TASKS))
    shape = model.shape
    is_target = name == llama_tiny.NAME

    def measure(task: str) -> float:
        decode = partial(_decode, model, max_tokens=llama_tiny.MAX_ANSWER_TOKENS)
        return exact_match(decode, per_task, seed=EVALUATION_SEED, tasks=[task])["all"]

    tables = accuracy_table({"exact match": measure})
    purpose = (
        "as a small draft model for llama-tiny, undertrained on purpose: otherwise "
        "hardly any of its drafts would be rejected"
    )
    exits = ""
    if is_target:
        purpose = "as the target of its tests and examples of speculative decoding"
        exits = (
            f", plus {llama_tiny.EXIT_WEIGHT} times that of every lower layer read "
            "out, higher layers weighted more (LayerSkip, arXiv 2404.16710, without "
            "its layer dropout and curriculum)"
        )
    card = _HEAD.format(
        pipeline="pipeline_tag: text-generation\n",
        tags="llama, speculative-decoding",
        name=name,
    ) + _LLAMA_CARD.format(
        accuracy=tables,
        bos_id=tiny_tokenizer.BOS_ID,
        columns="; the last layer's and that of three exits" if is_target else "",
        eos_id=tiny_tokenizer.EOS_ID,
        exits=exits,
        hardware=hardware(),
        heads=shape.n_heads,
        layers=shape.n_layers,
        megabytes=_megabytes(model_dir),
        millions=_millions(model),
        minutes=state["seconds"] / 60,
        mlp=shape.mlp_hidden_size,
        name=name,
        num_problems=per_task * len(tiny_tasks.TASKS),
        padding_weight=llama_tiny.PADDING_WEIGHT,
        per_task=per_task,
        purpose=purpose,
        rows=llama_tiny.BATCH_ROWS,
        seed=state["seed"],
        steps=state["step"],
        width=shape.d_model,
    )
    if is_target:
        table = _exit_table(model, num_problems)
        tables += "\n\n" + table
        card += _EXITS.format(exits=table)
    (model_dir / "README.md").write_text(card, encoding="utf-8")
    return tables


def exit_agreement(model: LlamaModel, answered: Answered) -> list[float]:
    """Share of the answers' tokens that each layer names, given the text before."""
    right = torch.zeros(model.shape.n_layers)
    for prompt, answer in zip(answered.prompts, answered.answers, strict=True):
        with torch.inference_mode():
            hidden = model(torch.tensor([prompt + answer]))[:, 0]
            named = model.head(hidden[:, len(prompt) - 1 : -1]).argmax(-1)
        right += (named == torch.tensor(answer)).sum(1)
    return (right / sum(map(len, answered.answers))).tolist()


def _exit_table(model: LlamaModel, num_problems: int) -> str:
    prompts = _held_out_prompts(num_problems)
    last = model.shape.n_layers
    answers = _decode(model, prompts, llama_tiny.MAX_ANSWER_TOKENS)
    agreement = exit_agreement(model, Answered(prompts, answers))
    lines = ["| after layer | exact match | agreement |", "|---|---|---|"]
    for layer in tqdm(range(1, last + 1), desc="exits"):
        decode = partial(
            decode_greedy,
            model,
            max_tokens=llama_tiny.MAX_ANSWER_TOKENS,
            exit_layer=layer,
        )
        share = exact_match(decode, num_problems, seed=EVALUATION_SEED)["all"]
        lines.append(
            f"| {layer} | {100 * share:.1f} % | {100 * agreement[layer - 1]:.1f} % |"
        )
    return "\n".join(lines)


def write_drafter_card(args: argparse.Namespace) -> str:
    """Measure what `vllm-dlm train deer` has trained and write README.md there.

    Args:
        args: The command's arguments.

    Returns:
        The table of accepted drafts in Markdown.
    """
    folder = Path(args.output_dir)
    model = load_model(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    state = torch.load(folder / "training.pt", weights_only=True)
    kept = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    target = load_causal_lm(args.target, args.device)
    if args.prompts is None:
        prompts = _held_out_prompts(args.num_problems)
    else:
        # The first ones are those that were kept out of the training.
        tokenizer = load_tokenizer(args.target)
        prompts = load_prompts(args.prompts, tokenizer, args.num_prompts, args.seed)
        prompts = prompts[: deer.kept_prompts(len(prompts))]
    answered = generate_answers(target, prompts, max_tokens=args.max_tokens)

    def draft(prefixes: list[list[int]]) -> list[list[int]]:
        return deer.draft_greedy(
            model, prefixes, args.block_length, config["mask_token_id"]
        )

    own = _batched(draft)
    lines = [
        _row(f"this, {args.block_length} masks", "1", measure_acceptance(own, answered))
    ]
    if args.target == llama_tiny.NAME:
        lines += _chain_rows(answered)
    command = "vllm-dlm train deer"
    if args.target != llama_tiny.NAME:
        command += f" --target {args.target}"
    if args.drafter is not None:
        command += f" --drafter {args.drafter}"
    if args.prompts is not None:
        command += f" --prompts {Path(args.prompts).name}"
    shape = model.shape
    steps = state["step"]
    card = _HEAD.format(
        pipeline="",
        tags="diffusion-language-model, masked-diffusion, llada, speculative-decoding",
        name=folder.resolve().name,
    ) + _DRAFTER_CARD.format(
        alpha=args.alpha,
        block=args.block_length,
        command=command,
        eos_id=config["eos_token_id"],
        hardware=hardware(),
        heads=shape.n_heads,
        layers=shape.n_layers,
        mask_id=config["mask_token_id"],
        max_refined=deer_data.MAX_REFINED,
        mean_length=sum(map(len, answered.answers)) / len(answered.answers),
        measured_on="held-out problems" if args.prompts is None else "kept prompts",
        megabytes=_megabytes(folder),
        millions=_millions(model),
        minutes=state["seconds"] / 60,
        mlp=shape.mlp_hidden_size,
        num_problems=len(prompts),
        num_prompts=len(kept["prompts"]),
        refining=steps - round(deer.STAGE_ONE_SHARE * steps),
        rows=deer_data.BATCH_ROWS,
        rows_of_table="\n".join(lines),
        seed=state["seed"],
        source="llada-tiny's tasks, no held-out question"
        if args.prompts is None
        else Path(args.prompts).name,
        steps=steps,
        target=args.target,
        width=shape.d_model,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return "\n".join(lines)


def _chain_rows(answered: Answered) -> list[str]:
    from vllm_dlm.aliases import resolve

    chain = load_llama(resolve("llama-tiny-draft"))
    rows = []
    for length in tqdm(CHAIN_LENGTHS, desc="chains"):
        draft = _batched(partial(_decode, chain, max_tokens=length))
        title = f"llama-tiny-draft, chains of {length}"
        rows.append(_row(title, str(length), measure_acceptance(draft, answered)))
    return rows


def _decode(
    model: LlamaModel, prompts: list[list[int]], max_tokens: int
) -> list[list[int]]:
    """Greedy answers of the last layer, each up to its end."""
    last = model.shape.n_layers
    end = tiny_tokenizer.EOS_ID
    answers = []
    for first in range(0, len(prompts), 64):
        answers += decode_greedy(
            model, prompts[first : first + 64], max_tokens=max_tokens, exit_layer=last
        )
    return [row[: row.index(end) + 1] if end in row else row for row in answers]


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


def _held_out_prompts(count: int) -> list[list[int]]:
    problems = tiny_tasks.sample_problems(count, EVALUATION_SEED, "heldout")
    return [
        tiny_tokenizer.encode_prompt(problem.question, chat=index % 2 == 0)
        for index, problem in enumerate(problems)
    ]


def _megabytes(folder: Path) -> float:
    return (folder / "model.safetensors").stat().st_size / 1e6


def _millions(model: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6
