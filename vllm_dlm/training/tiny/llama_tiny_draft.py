# SPDX-License-Identifier: Apache-2.0
"""Train the built-in draft model llama-tiny-draft: `vllm-dlm train llama-tiny-draft`.

A smaller llama-tiny: the same tasks and the same loop, without the exits' loss. It is
meant to be worse than its target at the harder tasks, as draft models are.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from vllm_dlm.tasks import tokenizer
from vllm_dlm.training.arguments import add_model_arguments
from vllm_dlm.training.loop import add_loop_arguments
from vllm_dlm.training.tiny import llama_tiny

if TYPE_CHECKING:
    from vllm_dlm.training.tiny.llada_modeling import LLaDAShape

NAME = "llama-tiny-draft"
# Few on purpose: after 1500 it answers 92 % of the problems, and hardly any draft is
# rejected.
STEPS = 350


def make_shape() -> LLaDAShape:
    """Sizes of llama-tiny-draft."""
    from vllm_dlm.training.tiny.llada_modeling import LLaDAShape

    return LLaDAShape(
        vocab_size=tokenizer.VOCAB_SIZE,
        d_model=96,
        n_layers=2,
        n_heads=3,
        mlp_hidden_size=256,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vllm-dlm train llama-tiny-draft`."""
    add_model_arguments(parser, NAME)
    add_loop_arguments(parser, steps=STEPS)


def run(args: argparse.Namespace) -> None:
    """Train, export, evaluate and write the model card."""
    llama_tiny.train_and_describe(args, name=NAME, shape=make_shape(), exit_weight=0.0)
