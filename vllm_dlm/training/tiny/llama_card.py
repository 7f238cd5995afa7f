# SPDX-License-Identifier: Apache-2.0
"""Measure llama-tiny or llama-tiny-draft and write its model card."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from vllm_dlm.files.whole_files import write_text
from vllm_dlm.tasks import tokenizer
from vllm_dlm.tasks.evaluation import exact_match
from vllm_dlm.tasks.problems import TASKS
from vllm_dlm.training.cards import (
    EVALUATION_SEED,
    HEAD,
    accuracy_table,
    hardware,
    held_out_prompts,
    megabytes,
    millions,
)
from vllm_dlm.training.progress import CHECKPOINT, read_progress
from vllm_dlm.training.tiny.llama_data import (
    BATCH_ROWS,
    MAX_ANSWER_TOKENS,
    PADDING_WEIGHT,
)
from vllm_dlm.training.tiny.llama_modeling import (
    LlamaModel,
    answer_greedy,
    decode_greedy,
    load_llama,
)

_CARD = """\
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
`vllm_dlm.tasks.problems`; held-out questions are never among them.
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


def write_card(
    model_dir: str | Path, name: str, num_problems: int, exit_weight: float
) -> str:
    """Measure a Llama in a folder and write README.md there.

    Args:
        model_dir: Folder of the exported model, with `training.pt` beside it.
        name: "llama-tiny" or "llama-tiny-draft".
        num_problems: Held-out problems over all tasks.
        exit_weight: That of the training's loss, which the card names.

    Returns:
        The tables in Markdown.
    """
    model_dir = Path(model_dir)
    model = load_llama(model_dir)
    state = read_progress(model_dir / CHECKPOINT)
    per_task = max(1, num_problems // len(TASKS))
    shape = model.shape
    is_target = name == "llama-tiny"

    def measure(task: str) -> float:
        decode = partial(answer_greedy, model, max_tokens=MAX_ANSWER_TOKENS)
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
            f", plus {exit_weight} times that of every lower layer read "
            "out, higher layers weighted more (LayerSkip, arXiv 2404.16710, without "
            "its layer dropout and curriculum)"
        )
    card = HEAD.format(
        pipeline="pipeline_tag: text-generation\n",
        tags="llama, speculative-decoding",
        name=name,
    ) + _CARD.format(
        accuracy=tables,
        bos_id=tokenizer.BOS_ID,
        eos_id=tokenizer.EOS_ID,
        exits=exits,
        hardware=hardware(),
        heads=shape.n_heads,
        layers=shape.n_layers,
        megabytes=megabytes(model_dir),
        millions=millions(model),
        minutes=state.seconds / 60,
        mlp=shape.mlp_hidden_size,
        name=name,
        num_problems=per_task * len(TASKS),
        padding_weight=PADDING_WEIGHT,
        per_task=per_task,
        purpose=purpose,
        rows=BATCH_ROWS,
        seed=state.seed,
        steps=state.step,
        width=shape.d_model,
    )
    if is_target:
        table = _exit_table(model, num_problems)
        tables += "\n\n" + table
        card += _EXITS.format(exits=table)
    write_text(model_dir / "README.md", card)
    return tables


def exit_agreement(
    model: LlamaModel, prompts: list[list[int]], answers: list[list[int]]
) -> list[float]:
    """Share of the answers' tokens that each layer names, given the text before.

    Args:
        prompts: Token ids.
        answers: Token ids, in the order of the prompts.

    Returns:
        A share per layer, the lowest first.
    """
    right = torch.zeros(model.shape.n_layers)
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            hidden = model(torch.tensor([prompt + answer]))[:, 0]
            named = model.head(hidden[:, len(prompt) - 1 : -1]).argmax(-1)
        right += (named == torch.tensor(answer)).sum(1)
    return (right / sum(map(len, answers))).tolist()


def _exit_table(model: LlamaModel, num_problems: int) -> str:
    prompts = held_out_prompts(num_problems)
    last = model.shape.n_layers
    answers = answer_greedy(model, prompts, MAX_ANSWER_TOKENS)
    agreement = exit_agreement(model, prompts, answers)
    lines = ["| after layer | exact match | agreement |", "|---|---|---|"]
    for layer in tqdm(range(1, last + 1), desc="exits"):
        decode = partial(
            decode_greedy,
            model,
            max_tokens=MAX_ANSWER_TOKENS,
            exit_layer=layer,
        )
        share = exact_match(decode, num_problems, seed=EVALUATION_SEED)["all"]
        lines.append(
            f"| {layer} | {100 * share:.1f} % | {100 * agreement[layer - 1]:.1f} % |"
        )
    return "\n".join(lines)
