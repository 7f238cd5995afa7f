# SPDX-License-Identifier: Apache-2.0
"""What else vLLM's server has, asked of a diffusion model: right, or refused by name.

The table in docs/compatibility.md names these tests. One server for all: `sdar-tiny`,
which shares prefixes, with adapters, a store of responses, and vLLM's routes for
developers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from reference.adapters import write_adapter, write_merged
from server.launch import REPLY_SECONDS, SIZES, VLLM, Server, running_server, until

from vllm_dlm.config.aliases import local_folder

pytestmark = pytest.mark.slow

MODEL = "sdar-tiny"
QUESTION = "Copy [Ada, Ben]"
CHAT = [{"role": "user", "content": QUESTION}]
LATER = "Reverse [Ada, Ben]"
PLAIN = {"chat_template_kwargs": {"enable_thinking": False}}
"""The server's parser of thoughts then takes a text for the answer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    base = Path(local_folder(MODEL))
    for number in (1, 2):
        write_adapter(folder / f"adapter-{number}", base, seed=number, std=0.1)
    write_merged(folder / "merged", base, folder / "adapter-1")
    return folder


@pytest.fixture(scope="module")
def features(folder: Path) -> Iterator[Server]:
    command = [
        *(VLLM, "serve", "--model", MODEL, *SIZES, "--scheduling-policy", "priority"),
        *("--enable-lora", "--max-loras", "2", "--max-lora-rank", "8"),
        *("--reasoning-parser", "qwen3"),
        *("--weight-transfer-config", '{"backend": "dlm_safetensors"}'),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        patch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        with running_server(command, folder / "log", MODEL) as running:
            yield running


def post(server: Server, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=REPLY_SECONDS)


def ask(server: Server, path: str, **body: Any) -> Any:
    reply = post(server, path, **{"model": MODEL, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


def text(server: Server, model: str = MODEL, prompt: str = QUESTION) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0}
    return ask(server, "/v1/completions", **body)["choices"][0]["text"]


def load(server: Server, name: str, path: Path, **more: Any) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(path), **more}
    return post(server, "/v1/load_lora_adapter", **body)


# -- adapters ----------------------------------------------------------------


def test_adapters_come_and_go(features: Server, folder: Path):
    """Two and the base in a batch; each writes what it writes alone."""
    for number in (1, 2):
        assert load(features, f"a{number}", folder / f"adapter-{number}").is_success
    names = [MODEL, "a1", "a2"]
    alone = [text(features, name) for name in names]
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(9) as pool:
        mixed = list(pool.map(lambda name: text(features, name), names * 3))
    assert mixed == alone * 3
    listed = {one.id for one in features.client.models.list()}
    assert listed == set(names)
    for number in (1, 2):
        body = {"lora_name": f"a{number}"}
        assert post(features, "/v1/unload_lora_adapter", **body).is_success
    body = {"model": "a1", "prompt": QUESTION, "max_tokens": 4}
    assert post(features, "/v1/completions", **body).status_code == 404


@pytest.mark.parametrize(
    ("has", "rank", "status", "said"),
    [
        (lambda name: True, 4, 400, ["lm_head", "merge"]),
        (lambda name: "q_proj" in name, 16, 400, ["rank 16", "max_lora_rank 8"]),
        (None, 4, 404, ["No adapter found"]),
    ],
    ids=["of the head", "of a high rank", "nowhere"],
)
def test_an_adapter_that_does_not_fit(
    features: Server, tmp_path: Path, has: Any, rank: int, status: int, said: list[str]
):
    folder = tmp_path / "x"
    if has is not None:
        base = Path(local_folder(MODEL))
        write_adapter(folder, base, seed=1, rank=rank, has=has)
    reply = load(features, "x", folder)
    message = reply.json()["error"]["message"]
    assert reply.status_code == status
    assert not [part for part in said if part not in message], message
    assert "Traceback" not in message


def test_an_adapter_in_place_of_another(features: Server, folder: Path):
    reply = load(features, "x", folder / "adapter-1", load_inplace=True)
    assert reply.status_code == 400
    assert "unload the adapter" in reply.json()["error"]["message"]


# -- routes for texts --------------------------------------------------------


def answer_of(response: dict[str, Any]) -> str:
    return response["output"][-1]["content"][0]["text"]


def test_responses_with_state(features: Server):
    """A later request goes on from the answer that the server has kept."""
    same = {"max_output_tokens": 16, "temperature": 0, **PLAIN}
    first = ask(features, "/v1/responses", input=QUESTION, **same)
    stored = httpx.get(f"{features.url}/v1/responses/{first['id']}").json()
    assert stored["output"] == first["output"]
    go_on = {"input": LATER, "previous_response_id": first["id"]}
    second = ask(features, "/v1/responses", **go_on, **same)
    history = [
        *CHAT,
        {"role": "assistant", "content": answer_of(first)},
        {"role": "user", "content": LATER},
    ]
    whole = ask(features, "/v1/responses", input=history, **same)
    assert answer_of(second) == answer_of(whole)
    assert second["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
    body = {"model": MODEL, "input": LATER, "previous_response_id": "resp_none"}
    assert post(features, "/v1/responses", **body).status_code == 404


def test_a_response_in_the_background(features: Server):
    same = {"max_output_tokens": 16, "temperature": 0, **PLAIN}
    wanted = answer_of(ask(features, "/v1/responses", input=QUESTION, **same))
    begun = ask(features, "/v1/responses", input=QUESTION, background=True, **same)
    url = f"{features.url}/v1/responses/{begun['id']}"
    until(lambda: httpx.get(url).json()["status"] == "completed", "it does not end")
    assert answer_of(httpx.get(url).json()) == wanted


def test_messages(features: Server):
    chat = ask(
        features,
        "/v1/chat/completions",
        **{"messages": CHAT, "max_tokens": 16, "temperature": 0, **PLAIN},
    )
    reply = ask(features, "/v1/messages", messages=CHAT, max_tokens=16, **PLAIN)
    wanted = chat["choices"][0]["message"]["content"]
    assert reply["content"] == [{"type": "text", "text": wanted}]
    assert reply["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    counted = ask(features, "/v1/messages/count_tokens", messages=CHAT)
    assert counted["input_tokens"] == chat["usage"]["prompt_tokens"]


def test_a_parser_of_thoughts(features: Server):
    """Qwen3's takes a text without an end of thought for a thought."""
    same = {"messages": CHAT, "max_tokens": 16, "temperature": 0}
    plain = ask(features, "/v1/chat/completions", **same, **PLAIN)
    thought = ask(features, "/v1/chat/completions", **same)["choices"][0]["message"]
    assert thought["content"] is None
    assert thought["reasoning"] == plain["choices"][0]["message"]["content"]


def test_tokens_of_a_prompt(features: Server):
    found = ask(features, "/tokenize", prompt=QUESTION)
    prompt = {"prompt": found["tokens"], "max_tokens": 16, "temperature": 0}
    reply = ask(features, "/v1/completions", **prompt)
    assert reply["usage"]["prompt_tokens"] == found["count"]
    assert reply["choices"][0]["text"] == text(features)
    back = ask(features, "/detokenize", tokens=found["tokens"])
    assert back["prompt"].endswith(QUESTION)


def test_echo_and_priority(features: Server):
    body = {"prompt": QUESTION, "max_tokens": 16, "temperature": 0}
    echoed = ask(features, "/v1/completions", echo=True, priority=3, **body)
    assert echoed["choices"][0]["text"] == QUESTION + text(features)


REFUSED: dict[str, tuple[str, dict[str, Any], int, str]] = {
    # id: (route, body, status, what the message holds)
    "embeddings": ("/v1/embeddings", {"input": "a"}, 404, "Not Found"),
    "pooling": ("/pooling", {"input": "a"}, 404, "Not Found"),
    "score": ("/v1/score", {"text_1": "a", "text_2": "b"}, 404, "Not Found"),
    "rerank": ("/rerank", {"query": "a", "documents": ["b"]}, 404, "Not Found"),
    "scores by tokens": (
        "/generative_scoring",
        {"query": "a", "items": ["b"], "label_token_ids": [5, 6]},
        400,
        "ask for `logprobs`",
    ),
    "prompt embeddings": (
        "/v1/completions",
        {"prompt_embeds": "AAAA", "max_tokens": 4},
        400,
        "prompt_embeds",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(features: Server, name: str):
    path, body, status, said = REFUSED[name]
    reply = post(features, path, model=MODEL, **body)
    assert reply.status_code == status
    assert said in reply.text


# -- routes for developers and trainings -------------------------------------


def cached_tokens(server: Server, prompt: list[int]) -> int:
    """Of a prompt, by vLLM's own count."""
    (before,) = server.metrics("prefix_cache_hits_total")
    ask(server, "/v1/completions", prompt=prompt, max_tokens=2, temperature=0)
    (after,) = server.metrics("prefix_cache_hits_total")
    return int(after - before)


def test_prefixes_are_forgotten_when_asked(features: Server):
    prompt = [10 + number % 60 for number in range(300)]
    cached_tokens(features, prompt)
    assert cached_tokens(features, prompt) >= 128
    assert post(features, "/reset_prefix_cache").is_success
    assert cached_tokens(features, prompt) == 0


def test_sleep(features: Server):
    """On a CPU nothing is given back; requests wait until the server wakes up."""
    wanted = text(features)
    for level in (1, 2):
        assert post(features, f"/sleep?level={level}").is_success
        url = f"{features.url}/is_sleeping"
        assert httpx.get(url).json() == {"is_sleeping": True}
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(text, features)
            time.sleep(0.5)
            assert not reply.done()
            assert post(features, "/wake_up").is_success
            assert reply.result() == wanted


def test_new_weights(features: Server, folder: Path):
    """A checkpoint in place of the one that is served, and back."""
    before = text(features)
    load(features, "a1", folder / "adapter-1")
    wanted = text(features, "a1")
    post(features, "/v1/unload_lora_adapter", lora_name="a1")
    assert wanted != before

    def transfer(source: str | Path) -> None:
        steps: tuple[tuple[str, dict[str, Any]], ...] = (
            ("/init_weight_transfer_engine", {"init_info": {}}),
            ("/start_weight_update", {}),
            ("/update_weights", {"update_info": {"path": str(source)}}),
            ("/finish_weight_update", {}),
            ("/reset_prefix_cache", {}),
        )
        for path, body in steps:
            reply = post(features, path, **body)
            assert reply.is_success, (path, reply.text)

    transfer(folder / "merged")
    assert text(features) == wanted
    transfer(local_folder(MODEL))
    assert text(features) == before
