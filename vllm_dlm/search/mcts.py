# SPDX-License-Identifier: Apache-2.0
"""Monte Carlo tree search over tokens: PG-TD (arXiv 2303.05510).

A node is a text, its children the likeliest next tokens. Each roll-out walks down to a
new node, completes its text greedily, and hands the score back up. A `Policy` says
which way the walk goes: PG-TD's, or V-STAR's value-guided one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

from pydantic import Field

from vllm_dlm.search.base import (
    Branch,
    Candidate,
    Complete,
    Driver,
    Extend,
    Score,
    Search,
    Step,
    Steps,
    Task,
    Text,
    Token,
    ranked,
)

Choice = tuple[Token, float]
"""A next token and its log-probability."""


@dataclass
class Child:
    """A next token of a node, and what came of it."""

    token: Token
    logprob: float
    prior: float
    """Its probability among the node's children."""
    best: float | None = None
    """The best return seen through it."""
    returns: int = 0
    node: Node | None = None


@dataclass
class Node:
    """A text."""

    text: Text
    depth: int = 0
    visits: int = 1
    value: float = 0.0
    """Its own return."""
    entropy: float = 0.0
    """Nats of the distribution that its last token was taken from."""
    children: list[Child] | None = None
    """None until the walk goes on from here for the first time."""


@runtime_checkable
class Policy(Protocol):
    """Which way the walk goes."""

    def asks(self, width: int) -> int:
        """Next tokens that it wants to see."""

    def choose(self, top: Sequence[Choice], width: int) -> list[Choice]:
        """Those that become children, the likeliest first.

        Args:
            top: the likeliest next tokens, the likeliest first.
            width: the search's option.
        """

    def urge(self, child: Child, node: Node, root: Node) -> float:
        """How much the walk wants to go to a child; the largest wins."""

    def grows(self, node: Node, peers: Sequence[Node]) -> bool:
        """Whether a node gets children.

        Args:
            peers: all nodes as deep as it.
        """


@dataclass(frozen=True)
class ProbabilityGuided:
    """PG-TD's P-UCB: the best return, and a bonus for likely tokens rarely taken."""

    c: float = 4.0
    base: float = 10.0

    def asks(self, width: int) -> int:
        """See `Policy`."""
        return width

    def choose(self, top: Sequence[Choice], width: int) -> list[Choice]:
        """See `Policy`."""
        return list(top[:width])

    def urge(self, child: Child, node: Node, root: Node) -> float:
        """See `Policy`."""
        beta = math.log((node.visits + self.base + 1) / self.base) + self.c
        bonus = beta * child.prior * math.sqrt(math.log(node.visits))
        return (child.best or 0.0) + bonus / (1 + child.returns)

    def grows(self, node: Node, peers: Sequence[Node]) -> bool:
        """See `Policy`."""
        return True


@dataclass(frozen=True)
class ValueGuided:
    """V-STAR's: the value of a text and its entropy, and a bonus for rare visits.

    A text of less than the mean of its depth is not gone on from. The scorer stands for
    V-STAR's value model; give `horizon=0`, so that it sees the unfinished text.

    Args:
        allowed: tokens that a text may have; None for all.
        entropy_weight, bonus: the paper's lambda and beta.
    """

    allowed: Collection[Token] | None = None
    entropy_weight: float = 0.1
    bonus: float = 1.0
    seen: int = 20
    """Next tokens among which those that are allowed are looked for."""

    def asks(self, width: int) -> int:
        """See `Policy`."""
        return width if self.allowed is None else max(self.seen, width)

    def choose(self, top: Sequence[Choice], width: int) -> list[Choice]:
        """See `Policy`."""
        allowed = self.allowed
        return [one for one in top if allowed is None or one[0] in allowed][:width]

    def urge(self, child: Child, node: Node, root: Node) -> float:
        """See `Policy`."""
        visits = child.node.visits if child.node else 0
        gain = self.gain(child.node) if child.node else self.gain(node)
        return gain + self.bonus * math.sqrt(math.log(root.visits + 1) / (visits + 1))

    def gain(self, node: Node) -> float:
        """Value of a text, and of what is open in it."""
        return node.value + self.entropy_weight * node.entropy

    def grows(self, node: Node, peers: Sequence[Node]) -> bool:
        """See `Policy`."""
        mean = math.fsum(map(self.gain, peers)) / len(peers)
        return self.gain(node) >= mean - 1e-12


class Mcts(Driver):
    """See the module docstring."""

    name = "mcts"
    summary = "tree search over next tokens, guided by scores (PG-TD)"
    paper = "PG-TD, arXiv 2303.05510"
    scorer: ClassVar = "needed"
    branches: ClassVar = True

    width: int = Field(default=3, ge=1, description="Next tokens that are tried.")
    rollouts: int = Field(default=16, ge=1, description="Texts that are scored.")
    max_tokens: int = Field(default=256, ge=1, description="Most tokens of a text.")
    enough: float = Field(
        default=1.0,
        description="A score with which the search ends: that of a text that is right.",
    )
    horizon: int | None = Field(
        default=None,
        ge=0,
        description="Score unfinished texts, so many tokens on, instead of complete "
        "ones. Default: complete.",
    )
    c: float = Field(
        default=4.0, ge=0, description="How much likely tokens are preferred."
    )
    base: float = Field(
        default=10.0, gt=0, description="Visits from which on exploration grows."
    )
    policy: Policy | None = Field(
        default=None,
        description="Which way the walk goes: an object with the methods of "
        "`vllm_dlm.search.mcts.Policy`, such as ValueGuided. Default: PG-TD's.",
    )

    def search(self, task: Task) -> Search:
        """See `Driver`."""
        tree = _Tree(self, task)
        for _ in range(self.rollouts):
            score = yield from tree.roll_out()
            if score is None or score >= self.enough:
                break
        found = tree.found
        whole = [candidate for candidate in found.values() if candidate.finished]
        if not whole:
            best = ranked([*found.values(), task.candidate(task.start)])[0].state
            ((piece,),) = yield Complete([best], self.max_tokens)
            text = task.add(best, piece)
            (score,) = yield Score([text])
            whole = [task.candidate(text, score)]
        return ranked(whole)


@dataclass
class _Tree:
    """The tree of one prompt."""

    driver: Mcts
    task: Task
    found: dict[Text, Candidate] = field(default_factory=dict)
    """What was scored."""

    def __post_init__(self) -> None:
        driver = self.driver
        self.policy = driver.policy or ProbabilityGuided(driver.c, driver.base)
        self.root = Node(self.task.start)
        self.levels: list[list[Node]] = [[self.root]]

    def roll_out(self) -> Steps:
        """Walk down, score, and hand the score up; returns it.

        None if no token may follow the prompt.
        """
        node, path = self.root, []
        while not node.text.finished:
            if node.children is None:
                if not self.policy.grows(node, self.levels[node.depth]):
                    break
                yield from self._grow(node)
            if not node.children:
                break
            # The first of equal ones is the likeliest.
            child = max(
                node.children,
                key=lambda child: self.policy.urge(child, node, self.root),
            )
            path.append((node, child))
            if child.node is None:
                child.node = self._make(node, child)
                node = child.node
                break
            node = child.node
        if not path:
            return None
        score = yield from self._evaluate(node)
        node.visits += 1
        for parent, child in path:
            child.best = score if child.best is None else max(child.best, score)
            child.returns += 1
            parent.visits += 1
        return score

    def _grow(self, node: Node) -> Steps:
        (top,) = yield Branch([node.text], self.policy.asks(self.driver.width))
        chosen = self.policy.choose(top, self.driver.width)
        total = math.fsum(math.exp(logprob) for _, logprob in chosen)
        node.children = [
            Child(token, logprob, math.exp(logprob) / total)
            for token, logprob in chosen
        ]

    def _make(self, node: Node, child: Child) -> Node:
        text = self.task.write(
            node.text, child.token, child.logprob, self.driver.max_tokens
        )
        priors = [sibling.prior for sibling in node.children or ()]
        entropy = -math.fsum(prior * math.log(prior) for prior in priors if prior)
        made = Node(text, node.depth + 1, entropy=entropy)
        if len(self.levels) == made.depth:
            self.levels.append([])
        self.levels[made.depth].append(made)
        return made

    def _evaluate(self, node: Node) -> Steps:
        """The score of what follows a node, from what is known where it can be."""
        text = node.text
        if not text.finished and text not in self.found:
            text = yield from self._follow(text)
        if text not in self.found:
            (score,) = yield Score([text])
            self.found[text] = self.task.candidate(text, score)
        node.value = self.found[text].score or 0.0
        return node.value

    def _follow(self, text: Text) -> Steps:
        horizon, most = self.driver.horizon, self.driver.max_tokens
        if horizon == 0:
            return text
        if horizon is not None:
            ((piece,),) = yield Extend([text], most, Step(tokens=horizon))
            return self.task.add(text, piece)
        length = len(text.written)
        for known in self.found:
            if known.written[:length] == text.written:
                return known
        ((piece,),) = yield Complete([text], most)
        return self.task.add(text, piece)
