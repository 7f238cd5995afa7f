# SPDX-License-Identifier: Apache-2.0
"""What is measured: each strategy as it is by default and in other ways, on what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_dlm.config.options import LONGEST_REQUEST_BLOCK
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.tasks.problems import FREE_TASKS


@dataclass(frozen=True)
class Workload:
    """Problems of some tasks, on canvases of one width."""

    title: str
    canvas: int
    tasks: tuple[str, ...] | None = None
    """Names of the tasks; None is all of them."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the requests, where a setting does not have them."""
    most_problems: int | None = None
    """Fewer where the first forward of a request is wide; None is all."""
    defaults_only: bool = False
    """Only strategies as they are, and none that writes the canvas whole: that takes a
    forward or more for each of its positions. Nor those that look at several blocks as
    one, where that is longer than a request may ask for."""


FEW_PROBLEMS = 32
"""For strategies that write a wide canvas whole, its padding included."""
WIDE_CANVAS = 64

WORKLOADS = [
    Workload("All tasks, canvas 64", 64),
    # Here tokens depend on each other: writing them together costs right answers.
    Workload("Tasks with several right answers, canvas 64", 64, FREE_TASKS),
    Workload(
        "All tasks, canvas 1024, `eotp` `canvas`",
        1024,
        options={"eotp": "canvas"},
        most_problems=16,
        defaults_only=True,
    ),
    Workload("All tasks, canvas 256", 256, most_problems=32, defaults_only=True),
]


@dataclass(frozen=True)
class Setting:
    """A strategy and what of its parameters and options is not the default."""

    strategy: str
    params: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    """Other options of the request."""
    tokens_per_step: int | None = None
    """Makes `steps` the canvas divided by it; None is one token per step."""

    def request_options(self, workload: Workload) -> dict[str, Any]:
        """The request's options on a workload."""
        options = {**workload.options, "strategy": self.strategy, **self.options}
        if self.params:
            options["strategy_config"] = self.params
        if self.tokens_per_step:
            options["steps"] = workload.canvas // self.tokens_per_step
        return options

    def is_measured(self, workload: Workload) -> bool:
        """Whether a workload has a row of it."""
        is_default = self.label == "default"
        scope = STRATEGIES[self.strategy].scope
        fits = scope == "block" or workload.canvas <= LONGEST_REQUEST_BLOCK
        in_blocks = fits and scope != "canvas"
        return not workload.defaults_only or (is_default and in_blocks)

    def most_problems(self, workload: Workload) -> int | None:
        """Fewer where each request takes hundreds of forwards; None is all."""
        whole = STRATEGIES[self.strategy].scope != "block"
        few = FEW_PROBLEMS if whole and workload.canvas > WIDE_CANVAS else None
        return workload.most_problems or few

    @property
    def label(self) -> str:
        """What is not the default, in words."""
        parts = [f"{name} {value}" for name, value in self.params.items()]
        parts += [f"{name} {value}" for name, value in self.options.items()]
        if self.tokens_per_step:
            parts.append(f"{self.tokens_per_step} tokens per step")
        return ", ".join(parts) or "default"


SETTINGS = [
    Setting("static"),
    Setting("static", tokens_per_step=2),
    Setting("static", tokens_per_step=4),
    Setting("threshold"),
    Setting("threshold", {"threshold": 0.7}),
    Setting("threshold", {"threshold": 0.5}),
    Setting("threshold", options={"eotp": "block"}),
    Setting("factor"),
    Setting("factor", {"factor": 1.5}),
    Setting("factor", {"factor": 2.0}),
    Setting("entropy"),
    Setting("entropy", {"threshold": 1.0}),
    Setting("eb"),
    Setting("eb", {"preset": "paper"}),
    Setting("eb", {"bound": 0.5}),
    Setting("eb", {"bound": 1.0}),
    Setting("localleap"),
    Setting("localleap", {"relaxed_threshold": 0.5}),
    Setting("hierarchy"),
    Setting("hierarchy", {"preset": "paper"}),
    Setting("hierarchy", {"threshold": 0.7, "low_threshold": 0.2}),
    Setting("hierarchy", {"remask": True}),
    Setting("cad"),
    Setting("cad", {"preset": "paper"}),
    Setting("cad", {"preset": "code", "release_end": 0.0}),
    Setting("cad", {"threshold": 0.6}),
    Setting("ete"),
    Setting("ete", {"threshold": 0.7}),
    Setting("ete", {"fewest_bits": 2.0}),
    Setting("multi_block"),
    Setting("multi_block", {"block": 8}),
    Setting("multi_block", {"block": 8, "threshold": 1.0}),
    Setting(
        "multi_block",
        {"block": 8, "by": "confidence", "threshold": 0.9, "push": "each"},
    ),
    Setting("pc"),
    Setting("pc", tokens_per_step=4),
    Setting("dream"),
    Setting("dream", tokens_per_step=4),
    Setting("diffucoder"),
    Setting("diffucoder", tokens_per_step=4),
    Setting("learn2pd"),
    Setting("learn2pd", {"threshold": 0.8}),
    Setting("learn2pd", options={"eotp": "off"}),
    Setting("bacd"),
    Setting("bacd", {"lowest": 0.4, "highest": 0.7}),
    Setting("klass"),
    Setting("klass", {"preset": "llada_gsm8k"}),
    Setting("klass", {"threshold": 0.7, "kl_threshold": 0.1}),
    Setting("credit"),
    Setting("credit", {"preset": "parameter_free"}),
    Setting("credit", {"weight": 1.5}),
    Setting("slowfast"),
    Setting("slowfast", {"preset": "code"}),
    Setting("slowfast", {"threshold": 0.6}),
    Setting("slowfast", {"slow_steps": 2}),
    Setting("joint"),
    Setting("joint", {"preset": "speed"}),
    Setting("joint", {"edit": False}),
    Setting("saber"),
    Setting("saber", {"fewest": 8}),
    Setting("prophet"),
    Setting("prophet", {"early": 12.0, "middle": 10.0, "late": 8.0}),
    Setting("eoser"),
    Setting("eoser", tokens_per_step=4),
    Setting("ass"),
    Setting("freedave"),
    Setting("freedave", {"drafts": 8}),
    Setting("freedave", {"threshold": 0.9}),
    Setting("lopa"),
    Setting("lopa", {"threshold": 0.7}),
]

LEFT_OUT = {
    "dmax": "llada-tiny is not trained to be fed mixtures; the page has what it does",
    "smooth": "it takes a server that makes all requests' embeddings; so has its page",
    "replay": "it repeats the order of another request, and is as good as that",
    "levenshtein": "llada-tiny, with which all are measured, has no tokens that edit",
    "linear_spec": "it is for causal models, and llada-tiny has full attention",
    "renoise": "it is for models that denoise random tokens, and llada-tiny has a mask",
}
