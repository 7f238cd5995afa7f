# SPDX-License-Identifier: Apache-2.0
"""Requests of all kinds for `benchmarks/soak.py`, and the manners of asking them.

A `Job` is a request whose answer is the same whenever it is asked: it is greedy, or has
a seed. A visitor asks it in one of several manners, or leaves, or sends a body that is
wrong; what is not as it should be is a line of text.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx

from vllm_dlm.strategies import STRATEGIES as REGISTERED

Body = dict[str, Any]

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"

PROMPTS = (
    *("Copy [Ada, Ben]", "Sort [Eva, Dan, Ada]", "Reverse [Ada, Ben, Carl]"),
    *("Spell ngkkkx backwards", "Ada lives in Rome and is 31.", "Hello, who are you?"),
)
NAMES = r"\[[A-Z][a-z]+(, [A-Z][a-z]+){1,3}\]"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
STRATEGIES = (
    *("static", "threshold", "factor", "entropy", "eb", "klass", "pc", "prophet"),
    *("credit", "saber", "freedave", "localleap", "joint", "slowfast", "eoser"),
)
"""Rules that remember steps, rewrite, draft, and read whole rows among them."""
IN_BLOCKS = tuple(name for name in STRATEGIES if REGISTERED[name].scope != "canvas")
"""Those that do not decide over the whole output at once."""


@dataclass(frozen=True)
class Kind:
    """What a model can be asked.

    A model with block attention has the server's block length, and computes no more
    than the active block: there are no cache policies to choose from.
    """

    full_attention: bool
    writes_json: bool = False


MODELS = {
    "llada-tiny": Kind(full_attention=True),
    "llada-forms": Kind(full_attention=True, writes_json=True),
    "sdar-tiny": Kind(full_attention=False),
}


@dataclass(frozen=True)
class Job:
    """A request that always has the same answer."""

    path: str
    body: Body

    @property
    def may_stream(self) -> bool:
        """Whether its streamed answer can be put together again: of these routes, and
        of a single choice."""
        return self.path in (COMPLETIONS, CHATS) and self.body.get("n", 1) == 1


def make_jobs(model: str, count: int, seed: int) -> list[Job]:
    """Different jobs of all kinds.

    Args:
        model: one of `MODELS`.
    """
    rng = random.Random(seed)
    kind = MODELS[model]
    makers = (_plain, _plain, _sampled, _chat, _canvas, _pattern, _elsewhere)
    return [makers[n % len(makers)](model, kind, rng) for n in range(count)]


def _options(kind: Kind, rng: random.Random) -> Body:
    strategy = rng.choice(STRATEGIES if kind.full_attention else IN_BLOCKS)
    chosen: Body = {"dlm_strategy": strategy}
    if not kind.full_attention:
        return chosen
    chosen["dlm_block_length"] = rng.choice((8, 16, 32))
    if strategy not in ("freedave", "joint"):  # which need exact keys and values
        chosen["dlm_cache"] = rng.choice(("none", "none", "prefix", "dual", "vicinity"))
    if strategy in ("static", "threshold") and rng.random() < 0.4:
        chosen["dlm_eotp"] = rng.choice(("block", "token", "canvas"))
    return chosen


def _plain(model: str, kind: Kind, rng: random.Random) -> Job:
    """A greedy text, which may take several canvases."""
    prompt = rng.choice(PROMPTS)
    if rng.random() < 0.3:
        prompt = f"{prompt} " * rng.randint(2, 12)
    body: Body = {
        "model": model,
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": rng.choice((1, 16, 40, 96, 160)),
        "vllm_xargs": _options(kind, rng),
    }
    if rng.random() < 0.5:
        body["ignore_eos"] = True
    if rng.random() < 0.3:
        body["stop"] = rng.choice(("Ben", ",", "a"))
    if rng.random() < 0.3:
        body["bad_words"] = ["Ben", "Ada Ben"]
    if rng.random() < 0.3:
        body["logprobs"] = 2
    return Job(COMPLETIONS, body)


def _sampled(model: str, kind: Kind, rng: random.Random) -> Job:
    job = _plain(model, kind, rng)
    drawn = {"temperature": 0.8, "seed": rng.randrange(1000)}
    drawn |= rng.choice(({}, {"top_k": 5}, {"top_p": 0.9}, {"n": 2}))
    return Job(job.path, job.body | drawn)


def _chat(model: str, kind: Kind, rng: random.Random) -> Job:
    question = [{"role": "user", "content": rng.choice(PROMPTS)}]
    body = {
        "model": model,
        "messages": question,
        "temperature": 0,
        "max_tokens": 48,
        "vllm_xargs": _options(kind, rng),
    }
    return Job(CHATS, body)


def _canvas(model: str, kind: Kind, rng: random.Random) -> Job:
    """An answer of which the request brings a part."""
    body: Body = {"model": model, "prompt": rng.choice(PROMPTS), "temperature": 0}
    if kind.full_attention and rng.random() < 0.4:
        return Job(COMPLETIONS, body | {"suffix": ", Ben]", "max_tokens": 6})
    asked = {"dlm_canvas_text": f"[Ada, {{{{{rng.randint(2, 20)}}}}}, {{{{last:4}}}}]"}
    if rng.random() < 0.5:
        asked["dlm_holes"] = "shrink"
    return Job(COMPLETIONS, body | {"max_tokens": None, "vllm_xargs": asked})


def _pattern(model: str, kind: Kind, rng: random.Random) -> Job:
    """A text that must match."""
    body: Body = {
        "model": model,
        "prompt": rng.choice(PROMPTS),
        "temperature": rng.choice((0, 0.8)),
        "seed": rng.randrange(1000),
        "max_tokens": 64,
    }
    asked: Body = rng.choice(({"regex": NAMES}, {"choice": ["Ada", "Ben", "Eva"]}))
    if kind.writes_json and rng.random() < 0.5:
        asked = {"json": PERSON}
    return Job(COMPLETIONS, body | {"structured_outputs": asked})


def _elsewhere(model: str, kind: Kind, rng: random.Random) -> Job:
    """By a route of other clients."""
    prompt = rng.choice(PROMPTS)
    common = {"model": model, "temperature": 0, "vllm_xargs": _options(kind, rng)}
    if rng.random() < 0.5:
        return Job(RESPONSES, common | {"input": prompt, "max_output_tokens": 32})
    question = [{"role": "user", "content": prompt}]
    return Job(MESSAGES, common | {"messages": question, "max_tokens": 32})


WRONG: tuple[tuple[str, bytes], ...] = (
    (COMPLETIONS, b"{"),
    (COMPLETIONS, b"[1, 2]"),
    (COMPLETIONS, b'{"prompt": "a", "vllm_xargs": {"dlm_strategy": "nope"}}'),
    (COMPLETIONS, b'{"prompt": "a", "vllm_xargs": {"dlm_threshold": 5}}'),
    (COMPLETIONS, b'{"prompt": "a", "vllm_xargs": {"dlm_canvas_text": "{{0}}"}}'),
    (COMPLETIONS, b'{"prompt": "a", "max_tokens": 100000}'),
    (COMPLETIONS, b'{"prompt": [9999999]}'),
    (COMPLETIONS, b'{"prompt": "a", "structured_outputs": {"regex": "(("}}'),
    (COMPLETIONS, b'{"prompt": "a", "stop_token_ids": [%s1]}' % (b"99999," * 20000)),
    (CHATS, b'{"messages": "a"}'),
    (CHATS, b'{"messages": [{"role": "user", "content": "a"}], "gen_length": 5}'),
    (RESPONSES, b'{"input": "a", "vllm_xargs": {"threshold": 0.5}}'),
    (MESSAGES, b'{"messages": [], "max_tokens": -1}'),
)
"""Bodies that are refused, each with a status of 4xx."""


def texts_of(path: str, answer: Body) -> list[str]:
    """What an answer says, and why it ended."""
    if path == RESPONSES:
        parts = [part for item in answer["output"] for part in item["content"]]
        return [*(part["text"] for part in parts), answer["status"]]
    if path == MESSAGES:
        return [*(part["text"] for part in answer["content"]), answer["stop_reason"]]
    told = []
    for choice in answer["choices"]:
        text = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
        told += [text or "", str(choice["finish_reason"])]
    return told


async def ask(client: httpx.AsyncClient, job: Job) -> list[str]:
    """A whole answer.

    Raises:
        ValueError: the status is not 200.
    """
    reply = await client.post(job.path, json=job.body)
    if reply.status_code != 200:
        raise ValueError(f"status {reply.status_code}: {reply.text[:300]}")
    return texts_of(job.path, reply.json())


async def ask_streamed(
    client: httpx.AsyncClient, job: Job, pause: Callable[[], float] = lambda: 0.0
) -> list[str]:
    """A streamed answer, put together.

    Args:
        pause: seconds to wait before the next event is read.

    Raises:
        ValueError: the status is not 200, or an event says that something failed.
    """
    text, reason = "", ""
    body = job.body | {"stream": True}
    async with client.stream("POST", job.path, json=body) as reply:
        if reply.status_code != 200:
            content = await reply.aread()
            raise ValueError(f"status {reply.status_code}: {content[:300]!r}")
        async for event in _events(reply):
            if "error" in event:
                raise ValueError(f"an event: {event['error']}")
            for choice in event["choices"]:
                has_text = job.path == COMPLETIONS
                text += (
                    choice["text"] if has_text else choice["delta"].get("content")
                ) or ""
                reason = choice.get("finish_reason") or reason
            if seconds := pause():
                await asyncio.sleep(seconds)
    return [text, reason]


async def _events(reply: httpx.Response) -> AsyncIterator[Body]:
    async for line in reply.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


Asking = Callable[[httpx.AsyncClient, Job], Awaitable[list[str]]]


@dataclass(frozen=True)
class Visitor:
    """One client after the other, each with another request and another manner."""

    client: httpx.AsyncClient
    rng: random.Random
    jobs: list[Job]
    alone: list[list[str]]
    """What each job is answered when the server has nothing else to do."""

    async def visit(self) -> tuple[str, str | None]:
        """Ask once.

        Returns:
            The manner, and what was wrong, if anything was.
        """
        draw = self.rng.random()
        if draw < 0.12:
            return "refused", await self._send_wrong()
        number = self.rng.randrange(len(self.jobs))
        job = self.jobs[number]
        if draw < 0.27:
            return "left", await self._leave(job)
        manner = "whole"
        asking: Asking = ask
        if job.may_stream and draw < 0.42:
            manner, asking = "slow", self._ask_slowly
        elif job.may_stream and draw < 0.7:
            manner, asking = "streamed", ask_streamed
        try:
            got = await asking(self.client, job)
        except (ValueError, KeyError, httpx.HTTPError) as error:
            return manner, f"{job.path} {json.dumps(job.body)}: {error!r}"
        if got != self.alone[number]:
            return manner, (
                f"{job.path} {json.dumps(job.body)}: {got}, and alone "
                f"{self.alone[number]}"
            )
        return manner, None

    def _ask_slowly(self, client: httpx.AsyncClient, job: Job) -> Awaitable[list[str]]:
        return ask_streamed(client, job, lambda: self.rng.uniform(0, 0.4))

    async def _leave(self, job: Job) -> str | None:
        """Close the connection before the answer is there, or in the midst of it."""
        asking: Asking = ask_streamed if job.may_stream else ask
        try:
            await asyncio.wait_for(
                asking(self.client, job), self.rng.choice((0.01, 0.1, 0.4))
            )
        except TimeoutError:
            return None
        except (ValueError, httpx.HTTPError) as error:
            return f"{job.path} {json.dumps(job.body)}: {error!r}"
        return None

    async def _send_wrong(self) -> str | None:
        path, content = self.rng.choice(WRONG)
        try:
            reply = await self.client.post(
                path, content=content, headers={"Content-Type": "application/json"}
            )
        except httpx.HTTPError as error:
            return f"{path} {content[:200]!r}: {error!r}"
        if 400 <= reply.status_code < 500 and reply.text:
            return None
        return (
            f"{path} {content[:200]!r}: status {reply.status_code} {reply.text[:200]}"
        )
