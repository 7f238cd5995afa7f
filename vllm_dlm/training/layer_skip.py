# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a model to do without some layers: `vllm-dlm train layer-skip MODEL`.

Unified layer skipping (arXiv 2404.06954): the layers that `schedule.py` reserves are
trained with the others left out, embeddings frozen. The data are the model's own
answers, and the loss compares with its distributions, so that it needs no answers of
others. The folder has all layers, and says in config.json which are served.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_dlm.files.model_folders import Config
from vllm_dlm.files.whole_files import write_text
from vllm_dlm.layer_skip.schedule import ARCHITECTURES, KEY, reserved_layers
from vllm_dlm.training.arguments import trained
from vllm_dlm.training.causal_options import (
    CausalOptions,
    add_causal_arguments,
    uncompiled,
)
from vllm_dlm.training.drafters.teacher import end_token_ids
from vllm_dlm.training.loop import LoopOptions, prepare, run_steps

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

NAME = "layer-skip-tiny"
STEPS = 600
SPEEDUP = 2.0

_CARD = """\
# {name}: {model} with {kept} of its {layers} layers

`{model}`, fine-tuned by `vllm-dlm train layer-skip --speedup {speedup:g}` to do \
without some of its layers (unified layer skipping, arXiv 2404.06954). Every token is \
computed by the layers {reserved}; config.json says so, and `vllm serve {folder}` \
serves it with vllm-dlm installed. Other software computes all layers, for which the \
model is no longer trained.

{steps} steps of {batch} answers of `{model}` itself. Greedily, on {shown} prompts \
that were kept out of the training, and on held-out problems of the built-in tasks, if \
the tokenizer is theirs:

| | layers per token | answers of `{model}` | {problems} held-out problems right |
|---|--:|--:|--:|
{rows}
"""


def train(
    output_dir: str | Path,
    options: LoopOptions,
    what: CausalOptions,
    *,
    speedup: float = SPEEDUP,
) -> bool:
    """Train a model and write it to `output_dir`; False if stopped before.

    Args:
        output_dir: Folder of the model, of the answers and of the checkpoint.
        options: How to run.
        what: What to train, and on what: a Llama, Qwen2 or Qwen3.
        speedup: Layers of the model for each that is kept.

    Raises:
        ValueError: models or prompts that do not fit, or a value out of its range.
    """
    prepare(options)
    import torch

    from vllm_dlm.training.causal import (
        agreement,
        distillation_loss,
        in_evaluation,
        load_task,
        plain_answers,
    )

    task = load_task(what, output_dir, seed=options.seed, reuse=options.resume)
    network, teacher = task.network, task.teacher
    reserved = reserved_layers(network.config.num_hidden_layers, speedup)
    architecture = served_by(network)
    network.get_input_embeddings().requires_grad_(False)

    def step_loss(forward: Callable[..., Any], step: int) -> torch.Tensor:
        rows = task.batch(f"layer-skip-{options.seed}-{step}", what.batch_rows)
        with torch.autocast(network.device.type, torch.bfloat16):
            with torch.no_grad():
                taught = teacher(rows.ids, use_cache=False).logits
            logits = forward(rows.ids, use_cache=False).logits
        return distillation_loss(logits, taught, rows.predicts)

    def evaluate(step: int) -> dict[str, float]:
        answers = in_evaluation(network, lambda: plain_answers(network, task.shown))
        return {"all": agreement(answers, task.shown)}

    with skipping(network, reserved):
        done = run_steps(
            output_dir,
            uncompiled(options),
            network,
            step_loss,
            evaluate,
            scale=what.scale,
        )
    if done:
        entries = {"architectures": [architecture], KEY: {"reserved": reserved}}
        task.save(output_dir, entries)
    return done


def write_card(args: argparse.Namespace) -> str:
    """Measure the model of a training that is over; write and return its card."""
    from vllm_dlm.training.causal import (
        agreement,
        load_trained,
        plain_answers,
        tasks_right,
    )

    what, folder = CausalOptions.from_args(args), Path(args.output_dir)
    task = load_trained(what, folder, seed=args.seed)
    network, teacher = task.network, task.teacher
    every = list(range(network.config.num_hidden_layers))
    reserved: list[int] = Config(folder).values[KEY]["reserved"]
    lines = []
    for title, net, layers in (
        ("all layers, before", teacher, every),
        ("skipping, before", teacher, reserved),
        ("skipping, after", network, reserved),
    ):
        with skipping(net, layers):
            same = agreement(plain_answers(net, task.shown), task.shown)
            right = tasks_right(net, args.num_problems)
        lines.append((title, len(layers), same, right))
    answers = [
        answer_behind_whole_prompt(network, reserved, prompt, what.max_tokens)
        for prompt in task.shown.prompts
    ]
    title = "skipping behind the prompt only, after"
    lines.append((title, len(reserved), agreement(answers, task.shown), None))
    card = _CARD.format(
        name=folder.name,
        model=what.model,
        kept=len(reserved),
        layers=len(every),
        speedup=args.speedup,
        reserved=", ".join(map(str, reserved)),
        folder=folder,
        steps=args.steps,
        batch=what.batch_rows,
        shown=len(task.shown.prompts),
        problems=args.num_problems,
        rows="\n".join(
            f"| {title} | {layers} | {100 * same:.1f} % | "
            + ("|" if right is None else f"{100 * right:.1f} % |")
            for title, layers, same, right in lines
        ),
    )
    write_text(folder / "README.md", card)
    return card


def answer_behind_whole_prompt(
    network: PreTrainedModel, reserved: list[int], prompt: list[int], max_tokens: int
) -> list[int]:
    """A greedy answer whose prompt is read by all layers, as in the published code.

    The layers that are skipped need no keys of the answer: nobody reads them.
    """
    import torch

    ends, answer = set(end_token_ids(network)), []
    ids = torch.tensor([prompt], device=network.device)
    with torch.inference_mode():
        output = network(ids, use_cache=True)
        with skipping(network, reserved):
            while True:
                token = int(output.logits[0, -1].argmax())
                answer.append(token)
                if token in ends or len(answer) == max_tokens:
                    return answer
                output = network(
                    ids.new_tensor([[token]]),
                    past_key_values=output.past_key_values,
                    use_cache=True,
                )


def served_by(network: PreTrainedModel) -> str:
    """The architecture that serves a network with some of its layers.

    Raises:
        ValueError: there is none.
    """
    name = type(network).__name__
    if name not in ARCHITECTURES:
        raise ValueError(
            f"layer skipping is for {', '.join(ARCHITECTURES)}, not for {name}"
        )
    return ARCHITECTURES[name]


@contextmanager
def skipping(network: PreTrainedModel, reserved: list[int]) -> Iterator[None]:
    """The network without its other layers, while the context is open."""
    import torch

    class Skipped(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
            return hidden_states

    layers: Any = network.get_decoder().layers
    skipped = {index: layers[index] for index in range(len(layers))}
    for index in skipped.keys() - set(reserved):
        layers[index] = Skipped()
    try:
        yield
    finally:
        for index, layer in skipped.items():
            layers[index] = layer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vllm-dlm train layer-skip`."""
    add_causal_arguments(parser, output_dir=NAME, steps=STEPS)
    parser.add_argument(
        "--speedup",
        type=float,
        default=SPEEDUP,
        help="layers of the model for each that is kept, the first and the last always",
    )


def run(args: argparse.Namespace) -> None:
    """Train the model, export it and write its card."""

    def go_on() -> bool:
        return train(
            args.output_dir,
            LoopOptions.from_args(args),
            CausalOptions.from_args(args),
            speedup=args.speedup,
        )

    if trained(args, go_on):
        print(write_card(args))
