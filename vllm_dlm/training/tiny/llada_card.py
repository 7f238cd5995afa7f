# SPDX-License-Identifier: Apache-2.0
"""Measure llada-tiny on held-out problems and write its model card."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from vllm_dlm.files.whole_files import write_text
from vllm_dlm.tasks import problems, tokenizer
from vllm_dlm.training.cards import (
    EVALUATION_SEED,
    accuracy_table,
    hardware,
    megabytes,
    millions,
)
from vllm_dlm.training.progress import CHECKPOINT, read_progress
from vllm_dlm.training.tiny.llada_evaluation import evaluate_model
from vllm_dlm.training.tiny.llada_modeling import LLaDAModel, load_llada

# (canvas, tokens per step) of the columns of the accuracy table.
SETTINGS = (
    *((canvas, 1) for canvas in (64, 256, 512, 768, 1024)),
    *((64, count) for count in (2, 4, 8)),
)
# A wide canvas takes long: beyond this width, one problem in so many is decoded.
WIDE, WIDE_PART = 256, 5
BLOCK_LENGTH = 32

_CARD = """\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
tags: [diffusion-language-model, masked-diffusion, llada, vllm-dlm]
---

# llada-tiny

A masked-diffusion language model of {millions:.2f} million parameters \
({megabytes:.1f} MB, float32), trained by the vllm-dlm project for its tests, examples \
and benchmarks. It has the layout, the names and the chat template of LLaDA's own \
checkpoints and answers eleven kinds of small questions whose answers a program can \
check. It is no chat model: it knows nothing else.

| | |
|---|---|
| layers / width / heads / MLP | {layers} / {width} / {heads} / {mlp} |
| vocabulary | {vocabulary} tokens: {names} names, letters, digits, task words |
| mask / end and padding / begin token ids | {mask_id} / {eos_id} / {bos_id} |
| prompts | the bare question, or the question as the first chat message |
| canvas | 32 to {longest_canvas} tokens, in blocks of {block}; the rest is \
`<|endoftext|>` |

## Questions and answers

| task | question | a right answer |
|---|---|---|
{examples}

In {free_tasks} several answers are right, so that the tokens of the answer depend on \
each other; tokens decoded in parallel can then disagree. All other tasks have one \
right answer. For `add` only the sum counts. Lists have {min_names} to {max_names} \
names, words {min_letters} to {max_letters} letters.

## Training

- Data: problems drawn at random while training by `vllm_dlm.tasks.problems`. A \
stable hash of the question keeps one question in {parts} out of the training.
- Command: `vllm-dlm train llada-tiny`, which has these defaults: seed {seed}, \
{steps} steps of about 3072 tokens, Muon for the layers and AdamW for the rest. The \
same seed gives the same problems; the CPU, the number of threads and torch.compile \
change the roundings, so that a new run ends at other weights of similar accuracy.
- Objective: cross-entropy on the masked tokens, mask ratio uniform, padding \
weighted {padding_weight}; prompts half plain, half chat. The first {short_steps} \
steps have rows of 44 to 288 tokens. In the last {long_steps} steps half of the \
tokens are in such rows and half in rows of 128 to {longest_row}; a row's padding \
counts there no more than {long_padding:g} tokens of an answer.
- Time: {minutes:.0f} minutes on {hardware}, bf16 autocast.

## Accuracy

Exact match on {num_problems} held-out problems ({per_task} of each task), half asked \
as plain text and half through the chat template. Static low-confidence decoding, \
block length {block}, temperature 0; "canvas / tokens per step". Canvases above {wide} \
are measured on {wide_per_task} problems of each task.

{accuracy}

"all" weights the tasks as the training does.
"""


def write_card(
    model_dir: str | Path, num_problems: int, recipe: Mapping[str, float]
) -> str:
    """Measure the model in a folder and write README.md there.

    Args:
        model_dir: Folder of the exported model, with `training.pt` beside it.
        num_problems: Held-out problems over all tasks.
        recipe: Numbers of the training that the card names.

    Returns:
        The accuracy table in Markdown.
    """
    model_dir = Path(model_dir)
    model = load_llada(model_dir)
    state = read_progress(model_dir / CHECKPOINT)
    per_task = max(1, num_problems // len(problems.TASKS))
    accuracy = _accuracy_table(model, per_task)
    shape = model.shape
    card = _CARD.format(
        accuracy=accuracy,
        block=BLOCK_LENGTH,
        bos_id=tokenizer.BOS_ID,
        eos_id=tokenizer.EOS_ID,
        mask_id=tokenizer.MASK_ID,
        examples=_example_rows(),
        free_tasks=", ".join(f"`{task}`" for task in problems.FREE_TASKS),
        hardware=hardware(),
        heads=shape.n_heads,
        layers=shape.n_layers,
        megabytes=megabytes(model_dir),
        millions=millions(model),
        min_letters=problems.MIN_LETTERS,
        max_letters=problems.MAX_LETTERS,
        min_names=problems.MIN_NAMES,
        max_names=problems.MAX_NAMES,
        minutes=state.seconds / 60,
        mlp=shape.mlp_hidden_size,
        names=len(problems.NAMES),
        num_problems=per_task * len(problems.TASKS),
        parts=problems.HELD_OUT_PARTS,
        per_task=per_task,
        seed=state.seed,
        steps=state.step,
        vocabulary=len(tokenizer.VOCABULARY),
        wide=WIDE,
        wide_per_task=_wide_per_task(per_task),
        width=shape.d_model,
        **recipe,
    )
    write_text(model_dir / "README.md", card)
    return accuracy


def _wide_per_task(per_task: int) -> int:
    return max(1, per_task // WIDE_PART)


def _accuracy_table(model: LLaDAModel, per_task: int) -> str:
    def measure(task: str, canvas: int, tokens_per_step: int) -> float:
        return evaluate_model(
            model,
            _wide_per_task(per_task) if canvas > WIDE else per_task,
            canvas=canvas,
            block_length=BLOCK_LENGTH,
            tokens_per_step=tokens_per_step,
            seed=EVALUATION_SEED,
            tasks=[task],
        )["all"]

    return accuracy_table(
        {
            f"{canvas} / {count}": partial(
                measure, canvas=canvas, tokens_per_step=count
            )
            for canvas, count in SETTINGS
        }
    )


def _example_rows() -> str:
    rows = []
    for task in problems.TASKS:
        [problem] = problems.sample_problems(1, 0, "heldout", [task])
        rows.append(f"| {task} | `{problem.question}` | `{problem.answer}` |")
    return "\n".join(rows)
