# SPDX-License-Identifier: Apache-2.0
"""A `vllm serve` process of its own, and what its users see of it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai

from vllm_dlm.cli.server_process import START_SECONDS as START_SECONDS
from vllm_dlm.cli.server_process import VLLM, serving
from vllm_dlm.cli.server_process import tail as tail

MODEL = "llada-tiny"
SIZES = (
    # Float32: equal texts are compared. Eager: a start without compilation.
    *("--dtype", "float32", "--enforce-eager"),
    *("--max-num-seqs", "16", "--max-num-batched-tokens", "2048"),
)
COMMAND = [
    *(VLLM, "serve", "--model", MODEL, "--dlm-strategy", "threshold", *SIZES),
    # Every run of the tests sees the same filters.
    "--no-dlm-online-learning",
    # For /inference/v1/generate.
    "--enable-scale-out",
    # For tools: without a parser vLLM refuses them itself.
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
]

REPLY_SECONDS = 300
IDLE_SECONDS = 180
"""Limits against hanging, generous: cores may be shared."""


class Server:
    """A running server, over HTTP only.

    Args:
        url: where it listens.
        model: the name it serves its model under.
        log: what it prints, where that is known.
    """

    def __init__(self, url: str, model: str = MODEL, log: Path | None = None) -> None:
        self.url = url
        self.model = model
        self.log = log
        self.client = openai.OpenAI(**self.client_options())

    def client_options(self) -> dict[str, Any]:
        """Arguments of an `openai` client of this server: no second tries."""
        return {
            "base_url": f"{self.url}/v1",
            "api_key": "none",
            "max_retries": 0,
            "timeout": REPLY_SECONDS,
        }

    # -- requests ----------------------------------------------------------

    def complete(
        self, prompt: str | list[int] = "Copy [Ada, Ben]", **options: Any
    ) -> Any:
        """A completion; options that `openai` does not know go into the body."""
        return self.client.completions.create(
            model=self.model, prompt=prompt, **split_options(options)
        )

    def text(self, prompt: str | list[int] = "Copy [Ada, Ben]", **options: Any) -> str:
        """The text of a completion."""
        return self.complete(prompt, **options).choices[0].text

    def chat(self, question: str = "Copy [Ada, Ben]", **options: Any) -> Any:
        """A chat completion of one question."""
        messages = [{"role": "user", "content": question}]
        return self.client.chat.completions.create(
            model=self.model, messages=messages, **split_options(options)
        )

    # -- what it reports ---------------------------------------------------

    def metrics(self, *names: str) -> tuple[float, ...]:
        """Values of metrics at one moment, summed over their labels.

        Args:
            names: without a prefix they are vLLM's own.
        """
        lines = httpx.get(
            f"{self.url}/metrics", timeout=REPLY_SECONDS
        ).text.splitlines()
        values = []
        for name in names:
            name = name if ":" in name else f"vllm:{name}"
            found = [line for line in lines if line.startswith(f"{name}{{")]
            assert found, f"no metric {name}"
            values.append(sum(float(line.rpartition(" ")[2]) for line in found))
        return tuple(values)

    def load(self) -> tuple[float, ...]:
        """Requests running, requests waiting, share of the KV cache in use."""
        return self.metrics(
            "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"
        )

    def wait_until_idle(self) -> None:
        """Wait until no request and no KV page is left."""
        until(lambda: self.load() == (0, 0, 0), "requests or KV pages are left behind")


def split_options(options: dict[str, Any]) -> dict[str, Any]:
    """Greedy unless told otherwise; fields that are vLLM's own go to `extra_body`."""
    own = {
        *("vllm_xargs", "min_tokens", "ignore_eos", "stop_token_ids", "top_k", "min_p"),
        *("return_token_ids", "repetition_penalty", "structured_outputs"),
        *("prompt_logprobs", "use_beam_search", "include_stop_str_in_output"),
        *("bad_words", "allowed_token_ids", "logprob_token_ids", "dlm_strategy"),
        *("best_of", "kv_transfer_params"),
    }
    known = {name: value for name, value in options.items() if name not in own}
    body = {name: value for name, value in options.items() if name in own}
    return {"temperature": 0, **known, "extra_body": body}


def until(condition: Callable[[], bool], message: str) -> None:
    """Wait for `condition`, but not for ever."""
    deadline = time.monotonic() + IDLE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.1)


@contextlib.contextmanager
def running_server(
    command: Sequence[str], log: Path, model: str = MODEL
) -> Iterator[Server]:
    """Start `command`, a `vllm serve`, on a free port; stop it in the end.

    Args:
        log: file for what it prints.
        model: the name it serves its model under.
    """
    # A user's server, not the in-process engine that the other tests ask for.
    environment = dict(os.environ)
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with serving(command, log, environment=environment) as url:
        yield Server(url, model, log)
