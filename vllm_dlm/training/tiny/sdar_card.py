# SPDX-License-Identifier: Apache-2.0
"""Measure sdar-tiny on the engine, and write its model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_dlm.files.whole_files import write_text
from vllm_dlm.tasks import tokenizer
from vllm_dlm.tasks.problems import TASKS
from vllm_dlm.training.block_causal import load_block_causal
from vllm_dlm.training.cards import (
    EVALUATION_SEED,
    HEAD,
    accuracy_table,
    hardware,
    megabytes,
    millions,
)
from vllm_dlm.training.progress import CHECKPOINT, read_progress
from vllm_dlm.training.tiny.sdar_data import BATCH_TOKENS, LEAST_MASKED
from vllm_dlm.training.tiny.sdar_served import answer_chats, answer_questions
from vllm_dlm.training.tiny.sdar_stages import stage_steps

if TYPE_CHECKING:
    from vllm import LLM

# Titles of the columns -> options of the requests.
SETTINGS: dict[str, Mapping[str, Any]] = {
    "static, 1 a step": {"strategy": "static"},
    "static, 2 a step": {"strategy": "static", "steps_per_block": 4},
    "threshold 0.9": {"strategy": "threshold"},
    "threshold 0.5": {"strategy": "threshold", "strategy_config": {"threshold": 0.5}},
    "factor": {"strategy": "factor"},
    "entropy": {"strategy": "entropy"},
}
TURNS, MAX_TOKENS = 6, 32
# Tokens of a KV page: with the usual 128, short chats share none.
PAGE = 32

_CARD = """\
A block-causal diffusion language model of {millions:.2f} million parameters \
({megabytes:.1f} MB, bfloat16), trained by the vllm-dlm project: the sibling of \
llada-tiny for the models that decode in blocks with a KV cache. It has the layout and \
the names of SDAR (`SDARForCausalLM`: a Qwen3 whose tokens see their own block of \
{block} and the blocks left of it, counted from the first token), and llada-tiny's \
tokenizer, chat template and questions, which that card shows. It is no chat model: it \
knows nothing else; but it takes chats of several turns, each with a question.

| | |
|---|---|
| layers / width / heads / MLP | {layers} / {width} / {heads} / {mlp} |
| mask / end and padding / begin token ids | {mask_id} / {eos_id} / {bos_id} |
| prompts | the bare question, or a chat of up to about {turns} turns |
| texts it was trained on | up to about 320 tokens; its context is {context} |

## Training

- Data: llada-tiny's problems, drawn at random while training by \
`vllm_dlm.tasks.problems`, alone or several in a chat; held-out questions are never \
among them.
- Command: `vllm-dlm train sdar-tiny`, which has these defaults: seed {seed}, {steps} \
steps of {tokens} tokens, Muon for the layers and AdamW for the rest. The same seed \
gives the same problems; roundings differ between machines, so that a new run ends at \
other weights of similar accuracy.
- Objective: block diffusion with a masked stream beside a clean one (SDAR, arXiv \
2510.06303). A share p of a block's answer is masked, p evenly from {least_masked} \
to 1; a mask's cross-entropy counts 1 / p. The blocks grow: {stages} (TDAR's extension).
- Time: {minutes:.0f} minutes on {hardware}, bf16 autocast.

## Accuracy

Measured by the engine in float32, at temperature 0, at most {max_tokens} tokens: \
exact match on {num_problems} held-out problems ({per_task} of each task), half asked \
as plain text and half through the chat template.

{accuracy}

"all" weights the tasks as the training does. `threshold 0.9` is what the model is \
served with by default; forwards are the mean of all answers, one request's forwards \
counted for itself.

Chats of {turns} turns by `threshold 0.9`, {chats} of them, the model's own answers in \
the history, KV pages of {page} tokens: exact match, and the share of the prompt's \
tokens whose KV prefix caching had.

{turn_table}
"""


def write_card(model_dir: str | Path, num_problems: int) -> str:
    """Measure the model in a folder on the engine, and write README.md there.

    Args:
        model_dir: Folder of the exported model, with `training.pt` beside it.
        num_problems: Held-out problems over all tasks.

    Returns:
        The tables in Markdown.
    """
    from vllm_dlm.entrypoints.llm import LLM

    model_dir = Path(model_dir)
    model = load_block_causal(model_dir)
    state = read_progress(model_dir / CHECKPOINT)
    per_task = max(1, num_problems // len(TASKS))
    chats = max(1, num_problems // 10)
    llm = LLM(
        str(model_dir),
        dtype="float32",
        block_size=PAGE,
        max_num_seqs=32,
        enforce_eager=True,
        kv_cache_memory_bytes=256 << 20,
    )
    accuracy = _accuracy_table(llm, per_task)
    turn_table = _turn_table(llm, chats)
    llm.llm_engine.engine_core.shutdown()
    shape = model.shape
    head = HEAD.format(
        pipeline="pipeline_tag: text-generation\n",
        tags="diffusion-language-model, block-diffusion, sdar",
        name="sdar-tiny",
    )
    card = head + _CARD.format(
        accuracy=accuracy,
        block=model.attention_block,
        bos_id=tokenizer.BOS_ID,
        chats=chats,
        context=shape.max_sequence_length,
        eos_id=tokenizer.EOS_ID,
        hardware=hardware(),
        heads=shape.n_heads,
        layers=shape.n_layers,
        least_masked=LEAST_MASKED,
        mask_id=tokenizer.MASK_ID,
        max_tokens=MAX_TOKENS,
        megabytes=megabytes(model_dir),
        millions=millions(model),
        minutes=state.seconds / 60,
        mlp=shape.mlp_hidden_size,
        num_problems=per_task * len(TASKS),
        page=PAGE,
        per_task=per_task,
        seed=state.seed,
        stages=", then ".join(
            f"{count} steps with blocks of {length}"
            for length, count in stage_steps(state.step).items()
        ),
        steps=state.step,
        tokens=BATCH_TOKENS,
        turn_table=turn_table,
        turns=TURNS,
        width=shape.d_model,
    )
    write_text(model_dir / "README.md", card)
    return f"{accuracy}\n\n{turn_table}"


def _accuracy_table(llm: LLM, per_task: int) -> str:
    found = {
        title: answer_questions(llm, options, per_task, EVALUATION_SEED, MAX_TOKENS)
        for title, options in SETTINGS.items()
    }
    table = accuracy_table(
        {title: answered.right.__getitem__ for title, answered in found.items()}
    )
    forwards = " | ".join(f"{answered.forwards:.2f}" for answered in found.values())
    return f"{table}\n| forwards per answer | {forwards} |"


def _turn_table(llm: LLM, chats: int) -> str:
    turns = answer_chats(
        llm, SETTINGS["threshold 0.9"], chats, TURNS, EVALUATION_SEED, MAX_TOKENS
    )
    rows = {
        "turn": [str(number + 1) for number in range(TURNS)],
        "exact match": [f"{100 * turn.right:.1f} %" for turn in turns],
        "prompt's tokens": [f"{turn.prompt_tokens:.0f}" for turn in turns],
        "of them cached": [f"{100 * turn.cached:.0f} %" for turn in turns],
    }
    lines = [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    lines.insert(1, "|---" * (TURNS + 1) + "|")
    return "\n".join(lines)
