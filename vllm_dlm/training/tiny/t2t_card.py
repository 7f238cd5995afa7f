# SPDX-License-Identifier: Apache-2.0
"""Measure llada-tiny-t2t in an engine, editing and not, and write its model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from vllm_dlm.files.whole_files import write_text
from vllm_dlm.tasks import tokenizer
from vllm_dlm.tasks.evaluation import evaluate_served
from vllm_dlm.tasks.problems import FREE_TASKS, TASKS, sample_problems
from vllm_dlm.training.cards import EVALUATION_SEED, HEAD, hardware, megabytes, millions
from vllm_dlm.training.progress import CHECKPOINT, read_progress
from vllm_dlm.training.tiny import edit_data
from vllm_dlm.training.tiny.llada_modeling import load_llada

CANVASES = (32, 64)
THRESHOLDS = (0.1, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# mask_threshold, edit_threshold, max_post_steps
JOINT = (
    *((0.0, 0.0, post) for post in (1, 2, 3, 16)),
    *((mask, edit, 16) for mask in (0.3, 0.5) for edit in (0.0, 0.5)),
)

Measured: TypeAlias = dict[tuple[str, int], dict[str, str]]
"""Tasks and canvas -> way to decode -> forwards and right answers."""

_CARD = """\
A masked-diffusion language model of {millions:.2f} million parameters \
({megabytes:.1f} MB, bfloat16), trained by the vllm-dlm project to show editing: \
llada-tiny, which has gone on to learn what the strategy `joint` needs, to see that a \
token is wrong that is written. Questions, answers, tokenizer and chat template are \
llada-tiny's. Its defaults are `joint` with mask_threshold {mask_threshold:g} and \
edit_threshold {edit_threshold:g}: a block is written in one forward, and corrected \
by further ones until nothing changes.

| | |
|---|---|
| layers / width / heads / MLP | {layers} / {width} / {heads} / {mlp} |
| mask / end and padding / begin token ids | {mask_id} / {eos_id} / {bos_id} |
| context, widest canvas | {context}, {max_canvas} tokens |

## Training

- Command: `vllm-dlm train llada-tiny-t2t`: from llada-tiny's weights, seed {seed}, \
{steps} steps, Muon for the layers and AdamW for the rest at {scale:g} of llada-tiny's \
rates. A step has about {mask_tokens} tokens in rows with masks, as llada-tiny's, and \
{edit_tokens} in rows to edit.
- Rows to edit: {free:.0f} % ask {free_tasks}, which have several right answers. In \
{own:.0f} % the model itself writes many masks at once, from one forward, and edits \
what it has written in {edited:.0f} % of these; in the others {replaced:.0f} % of the \
answer's tokens are replaced by drawn ones.
- Target: the right answer that is nearest to what is written, found by a program \
that knows the tasks (ours; for texts nobody can). It makes the correction a function \
of what stands there. Where nothing is wrong yet, masks keep their several answers.
- Objective: cross-entropy at all places of the canvas; a token that is right already \
counts {kept:g}.
- Time: {minutes:.0f} minutes on {hardware}, bf16 autocast, among other programs.

## Forwards and right answers

{num_problems} held-out problems of {free_tasks}, asked as plain text, greedy, by an \
engine, block {block}. "Forwards" are a request's mean. The column llada-tiny has the \
same requests to the model that this one was trained from. `joint` is named by \
mask_threshold / edit_threshold / max_post_steps.

{free_table}

All eleven tasks, {num_problems} held-out problems, canvas {canvas}. All but these \
three have one right answer, and threshold needs no second forward there; an edited \
block is looked at once more in any case.

{all_table}
"""


def write_card(
    model_dir: str | Path, num_problems: int, recipe: Mapping[str, object]
) -> str:
    """Measure the model in a folder and write README.md there.

    Args:
        model_dir: Folder of the exported model, with `training.pt` beside it.
        num_problems: Held-out problems of each table.
        recipe: What the card names of the training and of the model's defaults.

    Returns:
        Both tables in Markdown.
    """
    model_dir = Path(model_dir)
    model = load_llada(model_dir)
    state = read_progress(model_dir / CHECKPOINT)
    own = _measure(str(model_dir.resolve()), num_problems)
    before = _measure("llada-tiny", num_problems)
    free_table, all_table = (_table(own, before, title) for title in ("free", "all"))
    shape = model.shape
    card = HEAD.format(
        pipeline="pipeline_tag: text-generation\n",
        tags="diffusion-language-model, masked-diffusion, llada",
        name="llada-tiny-t2t",
    ) + _CARD.format(
        all_table=all_table,
        block=edit_data.BLOCK_LENGTH,
        bos_id=tokenizer.BOS_ID,
        canvas=CANVASES[0],
        context=shape.max_sequence_length,
        edit_tokens=edit_data.EDIT_TOKENS,
        edited=100 * edit_data.EDITED,
        eos_id=tokenizer.EOS_ID,
        free=100 * edit_data.FREE_SHARE,
        free_table=free_table,
        free_tasks=", ".join(f"`{task}`" for task in FREE_TASKS),
        hardware=hardware(),
        heads=shape.n_heads,
        kept=edit_data.KEPT_WEIGHT,
        layers=shape.n_layers,
        mask_id=tokenizer.MASK_ID,
        mask_tokens=edit_data.MASK_TOKENS,
        megabytes=megabytes(model_dir),
        millions=millions(model),
        minutes=state.seconds / 60,
        mlp=shape.mlp_hidden_size,
        num_problems=num_problems,
        own=100 * edit_data.ON_POLICY,
        replaced=100 * edit_data.REPLACED,
        seed=state.seed,
        steps=state.step,
        width=shape.d_model,
        **recipe,
    )
    write_text(model_dir / "README.md", card)
    return f"{free_table}\n\n{all_table}"


def settings() -> dict[str, dict[str, Any]]:
    """Rows of the tables -> the options of their requests."""
    found: dict[str, dict[str, Any]] = {}
    for threshold in THRESHOLDS:
        found[f"threshold {threshold:g}"] = {
            "strategy": "threshold",
            "strategy_config": {"threshold": threshold},
        }
    for mask, edit, post in JOINT:
        found[f"joint {mask:g} / {edit:g} / {post}"] = {
            "strategy": "joint",
            "strategy_config": {
                "mask_threshold": mask,
                "edit_threshold": edit,
                "max_post_steps": post,
            },
        }
    return found


def _table(own: Measured, before: Measured, title: str) -> str:
    """A row for each way to decode, and cells for both models and each canvas."""
    columns = {
        f"{name}canvas {canvas}: forwards, right": cells
        for name, measured in (("", own), ("llada-tiny, ", before))
        for (tasks, canvas), cells in measured.items()
        if tasks == title
    }
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in settings():
        cells = " | ".join(column[name] for column in columns.values())
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def _measure(model: str, num_problems: int) -> Measured:
    """Ask an engine of a model, in all ways to decode."""
    from vllm_dlm.entrypoints.llm import LLM

    llm = LLM(model, dtype="float32", max_num_seqs=64)
    found: Measured = {}
    for title, tasks, canvases in (
        ("free", FREE_TASKS, CANVASES),
        ("all", tuple(TASKS), CANVASES[:1]),
    ):
        problems = sample_problems(num_problems, EVALUATION_SEED, "heldout", tasks)
        for canvas in canvases:
            column = found[title, canvas] = {}
            for name, options in settings().items():
                served = evaluate_served(
                    llm,
                    problems,
                    {**options, "block_length": edit_data.BLOCK_LENGTH},
                    max_tokens=canvas,
                    progress=False,
                )
                forwards = f"{served.forwards_per_request:.2f}"
                column[name] = f"{forwards}, {100 * served.accuracy:.1f} %"
    llm.llm_engine.engine_core.shutdown()
    return found
