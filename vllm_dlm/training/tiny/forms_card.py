# SPDX-License-Identifier: Apache-2.0
"""Measure llada-forms on held-out problems and write its model card."""

from __future__ import annotations

import json
from pathlib import Path

from vllm_dlm.files.whole_files import write_text
from vllm_dlm.tasks.forms import values, vocabulary
from vllm_dlm.tasks.forms.evaluation import MAX_TOKENS, accuracy_table
from vllm_dlm.tasks.forms.problems import KINDS, Problem, held_out_problems
from vllm_dlm.training.cards import EVALUATION_SEED, HEAD, hardware, megabytes, millions
from vllm_dlm.training.progress import CHECKPOINT, read_progress
from vllm_dlm.training.tiny.forms_data import BATCH_TOKENS, ROWS
from vllm_dlm.training.tiny.llada_modeling import load_llada

_CARD = """\
A masked-diffusion language model of {millions:.2f} million parameters \
({megabytes:.1f} MB, bfloat16), trained by the vllm-dlm project to show structured \
output, holes and tools. It is the sibling of llada-tiny that can spell JSON: the same \
network and configuration, another vocabulary. It knows small records (people, pets, \
goods, meetings, books) and nothing else.

| | |
|---|---|
| layers / width / heads / MLP | {layers} / {width} / {heads} / {mlp} |
| vocabulary | {vocabulary} tokens: bytes, and the words of its forms; names and \
numbers are spelled in bytes |
| mask / end and padding / begin token ids | {mask_id} / {eos_id} / {bos_id} |
| prompts | bare text, or a chat; tools as the chat template writes them |
| context, widest canvas | {context}, {max_canvas} tokens |

The template writes a tool as `name(argument: type, ...)`; descriptions are left out. \
A call is `<tool_call>{{"name": ..., "arguments": {{...}}}}</tool_call>`: serve with \
`--enable-auto-tool-choice --tool-call-parser hermes`. Holes may be wider than what \
they need; the rest of a hole is `<|endoftext|>` (the option `holes` = `shrink`). \
Asked anything else, it answers with one sentence that says what it can do.

## Kinds of problems

| kind | share | prompt | canvas, `[...]` to be filled |
|---|---|---|---|
{examples}

## Training

- Data: problems drawn at random while training by `vllm_dlm.tasks.forms`. Names, \
cities and titles come from lists and from syllables; a stable hash keeps one word in \
{parts} out of the training, and the problems below have only such words.
- Command: `vllm-dlm train llada-forms`: seed {seed}, {steps} steps of about \
{batch_tokens} tokens, Muon for the layers and AdamW for the rest; rows of {shortest} \
to {longest} tokens.
- Objective: cross-entropy on the masked tokens of the holes, mask ratio uniform.
- Time: {minutes:.0f} minutes on {hardware}, bf16 autocast.

## Accuracy

Right answers on {per_kind} held-out problems of each kind, greedy, by an engine with \
its default strategy, `max_tokens` {max_tokens}. A JSON answer is right if it has the \
right keys in the right order with the right values; "JSON": it is JSON at all.

{accuracy}
"""


def write_card(model_dir: str | Path, num_problems: int, max_canvas: int) -> str:
    """Measure the model in a folder and write README.md there.

    Args:
        model_dir: Folder of the exported model, with `training.pt` beside it.
        num_problems: Held-out problems over all kinds.
        max_canvas: Its widest canvas, which the card names.

    Returns:
        The accuracy table in Markdown.
    """
    from vllm_dlm.entrypoints.llm import LLM

    model_dir = Path(model_dir)
    shape = load_llada(model_dir).shape
    state = read_progress(model_dir / CHECKPOINT)
    per_kind = max(1, num_problems // len(KINDS))
    llm = LLM(str(model_dir.resolve()), max_num_seqs=16)
    accuracy = accuracy_table(llm, per_kind, EVALUATION_SEED)
    llm.llm_engine.engine_core.shutdown()
    card = HEAD.format(
        pipeline="pipeline_tag: text-generation\n",
        tags="diffusion-language-model, masked-diffusion, llada",
        name="llada-forms",
    ) + _CARD.format(
        accuracy=accuracy,
        batch_tokens=BATCH_TOKENS,
        bos_id=vocabulary.BOS_ID,
        context=vocabulary.MAX_LENGTH,
        eos_id=vocabulary.EOS_ID,
        examples="\n".join(map(_example, KINDS)),
        hardware=hardware(),
        heads=shape.n_heads,
        layers=shape.n_layers,
        longest=max(ROWS),
        mask_id=vocabulary.MASK_ID,
        max_canvas=max_canvas,
        max_tokens=MAX_TOKENS,
        megabytes=megabytes(model_dir),
        millions=millions(load_llada(model_dir)),
        minutes=state.seconds / 60,
        mlp=shape.mlp_hidden_size,
        parts=values.HELD_OUT_PARTS,
        per_kind=per_kind,
        seed=state.seed,
        shortest=min(ROWS),
        steps=state.step,
        vocabulary=shape.vocab_size,
        width=shape.d_model,
    )
    write_text(model_dir / "README.md", card)
    return accuracy


def _example(kind: str) -> str:
    [problem] = held_out_problems(kind, 1, 0)
    share = 100 * KINDS[kind][0] / sum(weight for weight, _ in KINDS.values())
    prompt, canvas = _prompt(problem), _canvas(problem)
    return f"| {kind} | {share:.0f} % | {prompt} | {canvas} |"


def _prompt(problem: Problem) -> str:
    told = " / ".join(_code(turn.text) for turn in problem.turns)
    offered = ", ".join(f"`{tool.name}`" for tool in problem.tools)
    return f"{told} (tools: {offered})" if offered else told


def _canvas(problem: Problem) -> str:
    return _code(
        "".join(f"[{p.text}]" if p.is_hole else p.text for p in problem.pieces)
    )


def _code(text: str) -> str:
    """A text as code in a cell of a table."""
    return f"`{json.dumps(text, ensure_ascii=False)[1:-1]}`".replace('\\"', '"')
