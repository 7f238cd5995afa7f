# SPDX-License-Identifier: Apache-2.0
"""Searches over HTTP: a diffusion model that is served, and an autoregressive one."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server.launch import SIZES, VLLM, Server, running_server

from vllm_dlm import search
from vllm_dlm.cli.command import main
from vllm_dlm.search.endpoint import EndpointError

QUESTIONS = ["Copy [Ada, Ben]", "Shuffle [Ada, Ben, Carl]", "Sort [Noah, Finn, Jack]"]
END = "<|endoftext|>"


def ask(url: Any, driver: str, prompts: Any = QUESTIONS, **options: Any) -> Any:
    return search.run(url, driver, prompts, use_tqdm=False, **options)


def length(candidates: Any) -> list[float]:
    """Shorter is better."""
    return [-len(each.text) for each in candidates]


def test_best_of_n(server: Server):
    found = ask(server.url, "best_of_n", scorer=length, n=3, max_tokens=32, seed=5)
    for result, question in zip(found, QUESTIONS, strict=True):
        assert result.best.prompt == question
        assert len(result.candidates) == 3
        assert result.best.score == max(each.score for each in result.candidates)
        assert result.stats.requests == 3 and result.stats.generated > 3
        assert END not in result.best.text and result.best.finished
    # A seed is a text, whoever else asks.
    (again,) = ask(
        search.Endpoint(f"{server.url}/v1"),
        "best_of_n",
        QUESTIONS[:1],
        scorer=length,
        n=3,
        max_tokens=32,
        seed=5,
    )
    assert again.candidates == found[0].candidates


def test_votes_in_blocks_of_other_lengths(server: Server):
    """Each variant is asked as it says."""
    variants = [{"block_length": 4, "strategy": "static"}, {"strategy": "entropy"}]
    (result,) = ask(
        server.url,
        "vote",
        QUESTIONS[1:2],
        variants=variants,
        n=1,
        temperature=0,
        max_tokens=32,
    )
    assert sum(each.origin["votes"] for each in result.candidates) == 2
    for each in result.candidates:
        xargs = {"dlm": json.dumps(variants[each.origin["variant"]])}
        text = server.text(QUESTIONS[1], max_tokens=32, vllm_xargs=xargs)
        assert each.text == text


def test_texts_in_place_of_ids(server: Server):
    """As an endpoint that is not vLLM's is asked."""
    endpoint = search.Endpoint(server.url, tokens="text")
    options = {"n": 1, "temperature": 0, "max_tokens": 32}
    by_text, by_ids = (
        [each.best.text for each in ask(url, "best_of_n", **options)]
        for url in (endpoint, server.url)
    )
    assert by_text == by_ids == [server.text(q, max_tokens=32) for q in QUESTIONS]


def test_from_the_command_line(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Lines in, lines out: each as soon as it is there."""
    (tmp_path / "questions.jsonl").write_text(
        "".join(json.dumps({"question": q, "length": 8}) + "\n" for q in QUESTIONS)
    )
    (tmp_path / "scorers.py").write_text(
        "def near(found):\n"
        "    return [-abs(len(c.text) - c.record['length']) for c in found]\n"
    )
    argv = ["search", "best_of_n", f"{server.url}/v1", "--n", "2", "--max-tokens", "32"]
    argv += ["--prompts", str(tmp_path / "questions.jsonl"), "--num", "2", "--all"]
    argv += ["--scorer", f"{tmp_path / 'scorers.py'}:near", "--budget-requests", "2"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    found = sorted((json.loads(line) for line in lines), key=lambda one: one["index"])
    assert [each["prompt"] for each in found] == QUESTIONS[:2]
    for each in found:
        assert each["score"] == -abs(len(each["text"]) - 8)
        assert each["text"] == each["candidates"][0]["text"]
        assert len(each["candidates"]) == each["stats"]["requests"] == 2
    assert main([*argv, "--engine", '{"max_num_seqs": 8}']) == 2
    assert "--engine is for a model in this process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("driver", "options", "message"),
    [
        ("mcts", {"scorer": length}, "diffusion model has none; take one of: best_fir"),
        ("particles", {}, "does not tell where the blocks.*search offline"),
        ("vote", {"variants": [{"strategy": "best"}], "n": 1}, "400.*'best'.*learn2pd"),
        ("best_of_n", {"sampling": {"seed": 3}}, "seed is for the search to set"),
        ("best_of_n", {"sampling": {"top_k": "x"}}, "400"),
        ("best_of_n", {"max_tokens": 100_000}, "400"),
    ],
)
def test_what_is_refused(server: Server, driver: str, options: Any, message: str):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        ask(server.url, driver, QUESTIONS[:1], **options)
    server.wait_until_idle()


def test_endpoints_that_are_refused(server: Server):
    with pytest.raises(EndpointError, match="http://127.0.0.1:9"):
        ask("http://127.0.0.1:9", "best_of_n")
    with pytest.raises(EndpointError, match="404.*no-model"):
        ask(search.Endpoint(server.url, model="no-model"), "best_of_n")
    for options, message in (
        ({"url": "localhost:8000"}, "expected http://HOST:PORT/v1"),
        ({"tokens": "words"}, "expected 'auto', 'ids' or 'text'"),
        ({"end_tokens": END}, "expected a list of texts"),
        ({"concurrency": 0}, "concurrency 0: it must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            search.Endpoint(**{"url": server.url, **options})
    with pytest.raises(ValueError, match="'two tokens' is 10 tokens of llada-tiny"):
        ask(search.Endpoint(server.url, end_tokens=["two tokens"]), "best_of_n")


# An autoregressive model ------------------------------------------------------------

MODEL = "llama-tiny-draft"


@pytest.fixture(scope="module")
def autoregressive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = [VLLM, "serve", MODEL, *SIZES, "--kv-cache-memory-bytes", str(64 << 20)]
    with running_server(command, tmp_path_factory.mktemp("ar") / "log", MODEL) as it:
        yield it


@pytest.mark.slow
def test_the_same_over_http_and_offline(autoregressive: Server):
    from vllm.distributed.parallel_state import destroy_model_parallel

    from vllm_dlm import LLM

    destroy_model_parallel()
    llm = LLM(
        MODEL,
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=16,
        kv_cache_memory_bytes=64 << 20,
    )
    ids = search.Endpoint(autoregressive.url, end_tokens=[END])
    texts = search.Endpoint(autoregressive.url, end_tokens=[END], tokens="text")
    searches: dict[str, dict[str, Any]] = {
        "lookahead": {"tau": 0.5},
        "mcts": {"scorer": length, "enough": 9.0, "rollouts": 6},
        "best_first": {
            "scorer": lambda found: [1 / (1 + len(each.text)) for each in found],
            "k": 1,
            "temperature": 0,
            "step_stop": (", ",),
        },
        "best_of_n": {"scorer": length, "n": 2},
    }
    for name, options in searches.items():
        found = [
            [each.best.text for each in ask(where, name, max_tokens=24, **options)]
            for where in (llm, ids, texts)
        ]
        assert found[0] == found[1], name
        # A sample's seed is a hash of what is written, of ids or of texts.
        if name != "best_of_n":
            assert found[1] == found[2], name
    del llm
    gc.collect()


@pytest.mark.slow
def test_next_tokens_over_http(autoregressive: Server):
    with pytest.raises(ValueError, match="must know which tokens end a text"):
        ask(autoregressive.url, "lookahead", tau=1.0)
    few = search.Endpoint(autoregressive.url, end_tokens=[END], most_top=5)
    with pytest.raises(ValueError, match="looks at 20 next tokens.*tells 5"):
        ask(few, "lookahead", tau=1.0)
    assert ask(few, "lookahead", tau=1.0, top=5, max_tokens=12)[0].best.text
