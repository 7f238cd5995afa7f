# SPDX-License-Identifier: Apache-2.0
"""vLLM's own ways to draft, beside this plugin: the texts of plain decoding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from spec_decode.harness import Engine, params, ragged_prompts
from tiers import fast
from vllm.exceptions import VLLMValidationError

MASK = 63


@contextmanager
def drafted(engine: Engine) -> Iterator[list[int]]:
    """Lengths of the drafts that are verified while the context is open."""
    lengths: list[int] = []
    execute = engine.runner.execute_model

    def watch(output: Any, *args: Any, **kwargs: Any) -> Any:
        lengths.extend(map(len, output.scheduled_spec_decode_tokens.values()))
        return execute(output, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.runner, "execute_model", watch)
        yield lengths


@pytest.fixture(scope="module")
def parallel(draft: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft model that says which token stands for those still to come."""
    folder = tmp_path_factory.mktemp("parallel")
    shutil.copytree(draft, folder, dirs_exist_ok=True)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pard_token": MASK}))
    return folder


@pytest.mark.parametrize("method", fast("ngram", of=("ngram", "suffix", "parallel")))
def test_greedy_texts(
    plain: Engine, engines: Callable[..., Engine], parallel: Path, method: str
):
    if method == "suffix" and find_spec("arctic_inference") is None:
        pytest.skip("vLLM's suffix decoding needs the package arctic-inference")
    config: dict[str, Any] = {"method": method, "num_speculative_tokens": 4}
    if method == "ngram":
        config |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    if method == "parallel":
        config |= {"method": "draft_model", "model": str(parallel)}
        config |= {"parallel_drafting": True}
    num_threads = torch.get_num_threads()
    engine = engines(config)
    # Prompts that repeat themselves, for methods that look things up.
    prompts = [2 * prompt[:20] for prompt in ragged_prompts(8)]
    wanted = plain.run(prompts, params(24))
    with drafted(engine) as lengths:
        assert engine.run(prompts, params(24)) == wanted
    assert max(lengths) == 4
    for prompt, text in zip(prompts[:2], wanted, strict=False):
        assert engine.run([prompt], params(24)) == [text]
    assert torch.get_num_threads() == num_threads
    # Only our own methods know a limit for a request.
    limited = params(24, extra_args={"dlm_draft_tokens": 0})
    with pytest.raises(VLLMValidationError, match="is vLLM's own"):
        engine.run(prompts[:1], limited)
