# SPDX-License-Identifier: Apache-2.0
"""Where `vllm-dlm chat` has its answers from: a server's stream, or an engine here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from http.client import HTTPResponse
from typing import TYPE_CHECKING, Any, Protocol
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from vllm_dlm.watching.cells import Cells, Written

if TYPE_CHECKING:
    from vllm_dlm.entrypoints.frames import CanvasFrame

Message = dict[str, str]
"""`role` and `content`."""

SILENCE_SECONDS = 600
"""The longest time without a word from a server: a request may be queued."""


class Source(Protocol):
    """Who answers."""

    def answer(self, messages: list[Message], see: Callable[[Cells], object]) -> str:
        """The answer's text.

        Args:
            messages: the conversation so far.
            see: called with the canvas after each frame.

        Raises:
            ValueError: the question is refused.
            OSError: nobody answers.
        """


class ServerSource:
    """A server of vllm-dlm.

    Args:
        url: its address.
        model: the name of the model there; None for the only one, or the first.
        api_key: None for none.
        options: fields of a request.
        dlm: its options of diffusion.

    Raises:
        ValueError: it has no such model.
        OSError: no server answers.
    """

    def __init__(
        self,
        url: str,
        model: str | None,
        api_key: str | None,
        options: dict[str, Any],
        dlm: dict[str, Any],
    ) -> None:
        self._url = url
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        with self._ask("/v1/models") as reply:
            known = [one["id"] for one in json.load(reply)["data"]]
        if model is not None and model not in known:
            raise ValueError(
                f"the server has no model {model!r}; it has {', '.join(known)}"
            )
        extra = {"dlm": json.dumps({"frames": "writes", **dlm})}
        self._body = {
            "model": model or known[0],
            "stream": True,
            "vllm_xargs": extra,
            **options,
        }

    def answer(self, messages: list[Message], see: Callable[[Cells], object]) -> str:
        """See `Source`."""
        cells, text = Cells(), ""
        body = {**self._body, "messages": messages}
        with self._ask("/v1/chat/completions", body) as reply:
            for event in _events(reply):
                if "error" in event:
                    raise ValueError(event["error"]["message"])
                if event.get("type") == "diffusion_frame":
                    about = event["dlm"]
                    cells.apply(
                        [Written(*write) for write in about["writes"]],
                        end=about["end"],
                        canvas_end=about["canvas_end"],
                        forward=about["forward"],
                    )
                    see(cells)
                for choice in event["choices"]:
                    text += choice["delta"].get("content") or ""
        return text

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        try:
            reply: HTTPResponse = urlopen(
                Request(self._url + path, data, self._headers), timeout=SILENCE_SECONDS
            )
        except HTTPError as error:
            raise ValueError(_reason(error)) from None
        except URLError as error:
            raise OSError(
                f"no server answers at {self._url} ({error.reason})"
            ) from None
        return reply


def _events(reply: HTTPResponse) -> Iterator[dict[str, Any]]:
    """The events of a stream, until it says that it is done."""
    for line in reply:
        text = line.decode().strip()
        if text.startswith("data: {"):
            yield json.loads(text.removeprefix("data: "))


def _reason(error: HTTPError) -> str:
    """Why a server refuses, in its own words if it has some."""
    try:
        body = json.load(error)
        return str(body.get("error", body)["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {error.code} {error.reason}"


class EngineSource:
    """An engine of its own, in this process.

    Args:
        model: a folder, a hub id or a short name.
        options: sampling parameters.
        dlm: options of diffusion.
    """

    def __init__(
        self, model: str, options: dict[str, Any], dlm: dict[str, Any]
    ) -> None:
        # The canvas is the point here.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import SamplingParams

        from vllm_dlm.entrypoints.llm import LLM

        # One request at a time: a start without graphs is worth more.
        self._llm = LLM(model, max_num_seqs=1, enforce_eager=True)
        self._params = SamplingParams(**options, extra_args={"dlm": dlm})

    def answer(self, messages: list[Message], see: Callable[[Cells], object]) -> str:
        """See `Source`."""
        cells, tokenizer = Cells(), self._llm.get_tokenizer()

        def text_of(token: int | None) -> str | None:
            return None if token is None else tokenizer.decode([token])

        def on_frame(frame: CanvasFrame) -> None:
            writes = [
                Written(at, token, text_of(token), sure, step)
                for at, token, sure, step in frame.writes
            ]
            cells.apply(
                writes,
                end=frame.end,
                canvas_end=frame.canvas_end,
                forward=frame.forward,
            )
            see(cells)

        (output,) = self._llm.chat(
            messages, self._params, use_tqdm=False, on_frame=on_frame
        )
        return output.outputs[0].text
