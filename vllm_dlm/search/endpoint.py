# SPDX-License-Identifier: Apache-2.0
"""An OpenAI endpoint as the engine of a search: completions with log-probabilities.

A server of vLLM, ours or stock, takes and tells token ids, so that a text is gone on
from exactly. Of any other endpoint only texts are known: a token is then its text, and
a text that is gone on from may be cut into other tokens than it was written in.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from threading import Thread
from typing import Any, Literal, TypeVar

import httpx

from vllm_dlm.messages import quote
from vllm_dlm.search.adapter import TokenPace, UnknownPace, with_options
from vllm_dlm.search.base import Kind, Text, Token
from vllm_dlm.search.jobs import Job, Pace, Reply
from vllm_dlm.search.prompts import is_chat, refuse_the_drivers, token_ids

SERVER_LIMIT = 20
"""Next tokens that a server tells, if it was started with vLLM's default."""
ANSWER_CHARACTERS = 600
"""Most of an endpoint's error that a message repeats."""
OURS = "dlm:rows_total{"
"""Stands on `/metrics` where a diffusion model of ours is served."""
ID = "token_id:"


T = TypeVar("T")


class EndpointError(ValueError):
    """An endpoint cannot be reached, refused a request, or left something out."""


@dataclass(frozen=True)
class Endpoint:
    """Where an OpenAI API is.

    Args:
        url: with or without the `/v1` at its end.
        model: name of the model there. Default: the first that it lists.
        api_key: default: what `OPENAI_API_KEY` holds, if anything.
        end_tokens: tokens, as text, that end the model's texts ("<|endoftext|>").
            Searches that look at next tokens need them: an endpoint does not tell.
        tokens: "ids" if the endpoint is vLLM's, "text" for others; "auto" asks it.
        most_top: next tokens that the endpoint tells (OpenAI's own: 5).
        concurrency: requests at a time.
        timeout: seconds that a request may take.
    """

    url: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    end_tokens: Sequence[str] = ()
    tokens: Literal["auto", "ids", "text"] = "auto"
    most_top: int = SERVER_LIMIT
    concurrency: int = 32
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url {quote(self.url)}: expected http://HOST:PORT/v1")
        if self.tokens not in ("auto", "ids", "text"):
            raise ValueError(
                f"tokens {quote(self.tokens)}: expected 'auto', 'ids' or 'text'"
            )
        if isinstance(self.end_tokens, str) or not all(self.end_tokens):
            raise ValueError("end_tokens: expected a list of texts that are not empty")
        for name in ("most_top", "concurrency", "timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} {getattr(self, name)}: it must be above 0")

    @property
    def root(self) -> str:
        """The server's address, without `/v1`."""
        return self.url.rstrip("/").removesuffix("/v1")


class HttpEngine:
    """See `Engine`.

    Args:
        endpoint: where.
        sampling: fields that every request's body has besides.

    Raises:
        EndpointError: it cannot be reached.
        ValueError: fields that the driver sets.
    """

    def __init__(self, endpoint: Endpoint, sampling: Any = None) -> None:
        if not isinstance(sampling, Mapping | None):
            raise ValueError(
                "sampling: an endpoint takes the fields of its requests' bodies, as a "
                f"dict, not {quote(sampling)}"
            )
        self._body: dict[str, Any] = dict(sampling or {})
        refuse_the_drivers(self._body)
        self._endpoint = endpoint
        key = endpoint.api_key or os.environ.get("OPENAI_API_KEY")
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            # Whoever waits for a connection may wait for as long as others take.
            timeout=httpx.Timeout(endpoint.timeout, pool=None),
            limits=httpx.Limits(max_connections=endpoint.concurrency),
        )
        # A loop of its own: the caller may run in one. What is cancelled in it is cut
        # off from the server, which then stops as well.
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._jobs: dict[Future[Reply], Job] = {}
        self._decoded: dict[tuple[Token, ...], str] = {}
        self._seen_ends: set[Token] = set()
        try:
            self._look_around()
        except BaseException:
            self.close()
            raise

    def _look_around(self) -> None:
        """Find out what is served."""
        endpoint = self._endpoint
        models = self._get("/v1/models").get("data") or []
        self.model = endpoint.model or (models[0]["id"] if models else None)
        if self.model is None:
            raise EndpointError(f"{endpoint.url} lists no model: name one as `model`")
        is_vllm = any(each.get("owned_by") == "vllm" for each in models)
        asked = endpoint.tokens
        self._knows_ids = is_vllm if asked == "auto" else asked == "ids"
        stop = self._body.get("stop") or ()
        self.stops = (stop,) if isinstance(stop, str) else tuple(stop)
        self.most_top: int | None = endpoint.most_top
        is_diffusion = is_vllm and self._serves_diffusion()
        self.kind: Kind = "diffusion" if is_diffusion else "autoregressive"
        self.pace: Pace = UnknownPace() if is_diffusion else TokenPace()
        self.ends = frozenset(map(self._end_token, endpoint.end_tokens))

    # -- texts and tokens ------------------------------------------------------

    def _end_token(self, text: str) -> Token:
        if not self._knows_ids:
            return text
        tokens = self.encode_text(text)
        if len(tokens) != 1:
            raise ValueError(
                f"end_tokens: {quote(text)} is {len(tokens)} tokens of {self.model}, "
                "not one"
            )
        return tokens[0]

    def encode(self, prompt: Any) -> tuple[Token, ...]:
        """See `Engine`."""
        if isinstance(prompt, str):
            return self._encode({"prompt": prompt}) if self._knows_ids else (prompt,)
        if not self._knows_ids:
            raise ValueError(
                f"{quote(prompt)}: an endpoint that tells no token ids takes texts only"
            )
        if is_chat(prompt):
            return self._encode({"messages": list(prompt)})
        return token_ids(prompt)

    def _encode(self, body: Mapping[str, Any]) -> tuple[Token, ...]:
        return tuple(self._post("/tokenize", {"model": self.model, **body})["tokens"])

    def encode_text(self, text: str) -> tuple[Token, ...]:
        """See `Engine`."""
        if not self._knows_ids:
            raise ValueError("an endpoint that tells no token ids cannot cut texts")
        return self._encode({"prompt": text, "add_special_tokens": False})

    def decode(self, text: Text) -> str:
        """See `Engine`."""
        written = text.written
        while written and (written[-1] in self.ends or written[-1] in self._seen_ends):
            written = written[:-1]
        if not self._knows_ids or not written:
            return "".join(map(str, written))
        if written not in self._decoded:
            body = {"model": self.model, "tokens": list(written)}
            self._decoded[written] = str(self._post("/detokenize", body)["prompt"])
        return self._decoded[written]

    def vocabulary(self) -> Mapping[str, int] | None:
        """See `Engine`."""
        return None

    def check_options(self, options: Mapping[str, Any]) -> None:
        """See `Engine`: the endpoint checks them itself."""

    # -- jobs ------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """See `Engine`."""
        self._jobs[self._begin(self._ask(job))] = job

    def poll(self) -> Iterable[tuple[Job, Reply]]:
        """See `Engine`."""
        done, _ = wait(self._jobs, timeout=0.5, return_when=FIRST_COMPLETED)
        return [(self._jobs.pop(future), future.result()) for future in done]

    def cancel(self, jobs: Iterable[Job]) -> None:
        """See `Engine`."""
        unwanted = set(jobs)
        for future in [each for each, job in self._jobs.items() if job in unwanted]:
            future.cancel()
            del self._jobs[future]

    def close(self) -> None:
        """See `Engine`."""
        if self._loop.is_closed():
            return
        self._begin(self._client.aclose()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _ask(self, job: Job) -> Reply:
        answer = await self._call("POST", "/v1/completions", self._request(job))
        choice = answer["choices"][0]
        logprobs = choice.get("logprobs") or {}
        chances = logprobs.get("token_logprobs")
        if chances is None:
            raise EndpointError(
                f"{self._endpoint.url} sends no log-probabilities, which every search "
                "needs"
            )
        tokens = choice.get("token_ids") if self._knows_ids else logprobs.get("tokens")
        if tokens is None:
            raise EndpointError(
                f"{self._endpoint.url} tells no token ids: set tokens to 'text'"
            )
        usage = answer.get("usage") or {}
        details = usage.get("prompt_tokens_details") or {}
        reason, stop = choice.get("finish_reason"), choice.get("stop_reason")
        if reason not in ("stop", "length"):
            raise EndpointError(f"the endpoint ended a request: {quote(reason)}")
        if reason == "stop" and not isinstance(stop, str):
            stop = self._stop(choice, tokens, job)
        else:
            stop = stop if isinstance(stop, str) else None
        return Reply(
            tuple(tokens),
            tuple(float(chance) for chance in chances),
            reason,
            stop,
            self._top(logprobs, job.top) if job.top else (),
            usage.get("prompt_tokens") or 0,
            details.get("cached_tokens") or 0,
            usage.get("completion_tokens") or len(tokens),
        )

    def _stop(
        self, choice: Mapping[str, Any], tokens: Sequence[Token], job: Job
    ) -> str | None:
        """The stop string that ended a reply; None if that was a token.

        Raises:
            EndpointError: nobody can tell whether the text has ended.
        """
        text = str(choice.get("text"))
        if not self._knows_ids:
            text = "".join(map(str, tokens))
        if "stop_reason" not in choice:
            # Not a server of vLLM: a stop string is in the tokens, or nowhere.
            found = [stop for stop in (*self.stops, *job.stop) if stop in text]
            if found:
                return min(found, key=text.index)
            if job.stop:
                raise EndpointError(
                    f"{self._endpoint.url} does not say whether a text or a step has "
                    "ended: set step_tokens, and no step_stop"
                )
        if tokens and (self._knows_ids or text != choice.get("text")):
            self._seen_ends.add(tokens[-1])
        return None

    def _request(self, job: Job) -> dict[str, Any]:
        """The body that asks for a job."""
        tokens = (*job.text.prompt, *job.text.written)
        body: dict[str, Any] = {
            **self._body,
            "model": self.model,
            "prompt": list(tokens) if self._knows_ids else "".join(map(str, tokens)),
            "max_tokens": job.max_tokens,
            "temperature": job.temperature,
            # Some endpoints take 0 for "none".
            "logprobs": job.top or (0 if self._knows_ids else 1),
        }
        if job.seed is not None:
            body["seed"] = job.seed
        if stop := [*self.stops, *job.stop]:
            body["stop"] = stop
        if self._knows_ids:
            body["return_token_ids"] = True
            body["return_tokens_as_token_ids"] = True
        if stop and self._knows_ids:
            body["include_stop_str_in_output"] = True
        if job.options:
            options = {name: json.loads(value) for name, value in job.options}
            extra = with_options(body.get("vllm_xargs") or {}, options)
            body["vllm_xargs"] = {**extra, "dlm": json.dumps(extra["dlm"])}
        return body

    def _top(
        self, logprobs: Mapping[str, Any], k: int
    ) -> tuple[tuple[Token, float], ...]:
        tops = logprobs.get("top_logprobs") or []
        if not tops or not tops[0]:
            raise EndpointError(
                f"{self._endpoint.url} does not tell the likeliest next tokens, which "
                "this search needs: best_of_n and vote do not"
            )
        found: list[tuple[Token, float]] = [
            (int(name.removeprefix(ID)) if self._knows_ids else name, float(chance))
            for name, chance in tops[0].items()
        ]
        return tuple(sorted(found, key=lambda one: one[1], reverse=True)[:k])

    # -- HTTP ------------------------------------------------------------------

    def _serves_diffusion(self) -> bool:
        """Whether a server of vLLM has a diffusion model of ours."""
        address = f"{self._endpoint.root}/metrics"
        try:
            answer = self._begin(self._client.get(address)).result()
        except httpx.HTTPError:
            return False
        return answer.status_code == 200 and OURS in answer.text

    def _get(self, path: str) -> Any:
        return self._begin(self._call("GET", path, None)).result()

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._begin(self._call("POST", path, body)).result()

    async def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> Any:
        url = f"{self._endpoint.root}{path}"
        try:
            answer = await self._client.request(method, url, json=body)
        except httpx.HTTPError as error:
            raise EndpointError(f"{url}: {error or type(error).__name__}") from error
        if answer.status_code != 200:
            raise EndpointError(
                f"{url} answers {answer.status_code}: {_message(answer.text)}"
            )
        try:
            return answer.json()
        except ValueError:
            raise EndpointError(f"{url} does not answer in JSON") from None


def _message(text: str) -> str:
    """What an endpoint says is wrong."""
    try:
        error = json.loads(text)
        text = str(error.get("error", error).get("message", text))
    except (ValueError, AttributeError):
        pass
    return text[:ANSWER_CHARACTERS]
