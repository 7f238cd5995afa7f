# SPDX-License-Identifier: Apache-2.0
"""What is sent again and again because it once was, or easily would be, a fault; and
what vLLM answers with a status of 5xx though nothing is wrong with the server."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import httpx


@dataclass(frozen=True)
class Known:
    """An answer of 5xx that is vLLM's own, and is meant, or a fault there."""

    path: str
    status: int
    message: str
    """A part of it."""
    content: bytes
    """A body that gets it."""


KNOWN = (
    # Raised for every model without heads for it; 501 is what HTTP has for that.
    Known(
        "/v1/systemone",
        501,
        "does not support the structured decision API",
        b'{"model": "llada-tiny", "state": null, "questions": {}}',
    ),
    # SageMaker's wrapper of the route (model_hosting_container_standards) reads the
    # body before vLLM does, and does not expect that. Other routes say 400.
    Known(
        "/invocations",
        500,
        "maximum recursion depth exceeded",
        b'{"messages":' * 5000,
    ),
)


def is_known(path: str, reply: httpx.Response) -> bool:
    """Whether an answer is one of those."""
    return any(
        path == one.path
        and reply.status_code == one.status
        and one.message in reply.text
        for one in KNOWN
    )


_CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Copy [Ada, Ben]"}]}
_PROMPT: dict[str, Any] = {"prompt": "Copy [Ada, Ben]", "max_tokens": 8}


def _asks(**options: Any) -> dict[str, Any]:
    return _PROMPT | {"vllm_xargs": {f"dlm_{k}": v for k, v in options.items()}}


CORPUS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/completions", _PROMPT | {"max_tokens": 0}),
    ("/v1/completions", _PROMPT | {"prompt": []}),
    ("/v1/completions", _PROMPT | {"prompt": ""}),
    ("/v1/completions", _PROMPT | {"prompt": [[]]}),
    ("/v1/completions", _PROMPT | {"prompt": "\ud800"}),
    ("/v1/completions", _PROMPT | {"prompt": [5] * 1023, "max_tokens": 1}),
    ("/v1/completions", _PROMPT | {"prompt": [126, 125, 0]}),
    ("/v1/completions", _PROMPT | {"suffix": "", "echo": True}),
    ("/v1/completions", _PROMPT | {"suffix": "\x00"}),
    ("/v1/completions", _PROMPT | {"stop": ["", "\ud800"]}),
    ("/v1/completions", _PROMPT | {"bad_words": ["", " "]}),
    ("/v1/completions", _PROMPT | {"bad_words": ["\ud800"]}),
    ("/v1/completions", _PROMPT | {"logit_bias": {str(n): -100 for n in range(128)}}),
    ("/v1/completions", _PROMPT | {"allowed_token_ids": []}),
    ("/v1/completions", _PROMPT | {"temperature": 1e-300, "seed": 2**63 - 1}),
    ("/v1/completions", _PROMPT | {"temperature": 1, "top_p": 1e-300, "top_k": 1}),
    ("/v1/completions", _PROMPT | {"min_tokens": 8, "stop_token_ids": [5, 5]}),
    ("/v1/completions", _PROMPT | {"logprobs": 0, "stream": True}),
    ("/v1/completions", _PROMPT | {"stream_options": {"include_usage": True}}),
    ("/v1/completions", _PROMPT | {"cache_salt": "", "priority": 2**70}),
    ("/v1/completions", _PROMPT | {"structured_outputs": {"regex": "("}}),
    ("/v1/completions", _PROMPT | {"structured_outputs": {"regex": "(a{999}){999}"}}),
    ("/v1/completions", _PROMPT | {"structured_outputs": {"regex": "\ud800"}}),
    ("/v1/completions", _PROMPT | {"structured_outputs": {"choice": []}}),
    ("/v1/completions", _PROMPT | {"structured_outputs": [1]}),
    ("/v1/chat/completions", _CHAT | {"structured_outputs": "a"}),
    ("/v1/chat/completions", {"messages": 1}),
    ("/v1/responses", {"input": "Copy [Ada, Ben]", "tools": 1}),
    *(
        ("/v1/responses", {"input": "Copy [Ada, Ben]", name: None, "stream": stream})
        for name in ("background", "truncation")
        for stream in (False, True)
    ),
    ("/v1/completions", _PROMPT | {"structured_outputs": {"json": {"$ref": "#"}}}),
    ("/v1/completions", _PROMPT | {"structured_outputs": {}}),
    ("/v1/completions", _PROMPT | {"structured_outputs": {"structural_tag": "{}"}}),
    ("/v1/completions", _PROMPT | {"repetition_detection": {"max_pattern_size": -1}}),
    ("/v1/completions", _asks(canvas="[]")),
    ("/v1/completions", _asks(canvas="[125]")),
    ("/v1/completions", _asks(canvas="[5, 126, 126]", pinned=0)),
    ("/v1/completions", _asks(canvas_text="{{" + "9" * 4000 + "}}")),
    ("/v1/completions", _asks(canvas_text="{{2}}{{a:2}}{{a:2}}")),
    ("/v1/completions", _asks(canvas_text="\ud800{{2}}")),
    ("/v1/completions", _asks(strategy="replay", recorded_steps="[0, -1, 3]")),
    ("/v1/completions", _asks(strategy="learn2pd", block_length=13)),
    ("/v1/completions", _asks(strategy="freedave", drafts=16, block_length="canvas")),
    ("/v1/completions", _asks(cache="window", active_window=1, refresh_every=1)),
    ("/v1/completions", _asks(growth="daedal", initial=1, expansion=1)),
    ("/v1/completions", _asks(steps=1, strategy="static", reference_exact=1)),
    ("/v1/completions", _PROMPT | {"vllm_xargs": {"dlm": "null"}}),
    ("/v1/completions", _PROMPT | {"vllm_xargs": {"": ""}}),
    ("/v1/chat/completions", {"messages": []}),
    ("/v1/chat/completions", {"messages": [{"role": "user"}], "max_tokens": 4}),
    ("/v1/chat/completions", _CHAT | {"n": 2, "stream": True, "max_tokens": 4}),
    ("/v1/chat/completions", _CHAT | {"chat_template": "{{", "max_tokens": 4}),
    ("/v1/chat/completions", _CHAT | {"chat_template_kwargs": {"messages": 1}}),
    ("/v1/chat/completions", _CHAT | {"add_generation_prompt": False, "echo": True}),
    ("/v1/chat/completions", _CHAT | {"tools": [{"type": "function"}]}),
    ("/v1/chat/completions", _CHAT | {"tools": [], "tool_choice": "required"}),
    ("/v1/responses", {"input": [], "max_output_tokens": 4}),
    ("/v1/responses", {"input": [{"type": "reasoning"}], "max_output_tokens": 4}),
    ("/v1/responses", {"input": "a", "previous_response_id": "resp_1"}),
    ("/v1/responses", {"input": "a", "background": True, "max_output_tokens": 4}),
    ("/v1/messages", {"messages": [], "max_tokens": 4}),
    ("/v1/messages", _CHAT | {"max_tokens": 4, "system": [{"type": "image"}]}),
    ("/v1/messages", _CHAT | {"max_tokens": 4, "thinking": {"type": "enabled"}}),
    ("/inference/v1/generate", {"token_ids": [], "sampling_params": {}}),
    ("/inference/v1/generate", {"token_ids": [5], "features": {}}),
    ("/tokenize", {"prompt": "\ud800"}),
    ("/detokenize", {"tokens": [-1, 2**40]}),
    ("/v1/completions/derender", {"generate_responses": [{}]}),
    ("/generative_scoring", {"query": "a", "items": [], "label_token_ids": [2**40]}),
    ("/invocations", {}),
)
"""Path and body, without the model's name."""


def named(path: str, body: dict[str, Any]) -> str:
    """What a failing test calls an entry."""
    return f"{path} {json.dumps(body)[:80]}"
