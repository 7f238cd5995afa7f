# SPDX-License-Identifier: Apache-2.0
"""What the config hook tells vLLM of CUDA graphs; no graph is captured here."""

from __future__ import annotations

from importlib.resources import files
from itertools import pairwise
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from vllm_dlm.model_executor.config_hook import (
    WIDEST_GRAPH,
    _serve_graphs,
    graph_sizes,
)

LLADA_TINY = str(files("vllm_dlm") / "assets" / "llada-tiny")


@pytest.fixture(scope="module")
def served() -> VllmConfig:
    """The configuration of a server on a CPU."""
    return EngineArgs(
        LLADA_TINY,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        additional_config={"dlm": {"cache": "dual", "block_length": 32}},
    ).create_engine_config()


@pytest.fixture
def captures(served: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> VllmConfig:
    """The same, as if graphs could be captured, and before vLLM chooses any."""
    platform, compilation = type(current_platform), served.compilation_config
    monkeypatch.setattr(
        platform, "support_static_graph_mode", classmethod(lambda cls: True)
    )
    monkeypatch.setattr(served, "diffusion_config", None)
    for field in (
        "cudagraph_mode",
        "cudagraph_capture_sizes",
        "max_cudagraph_capture_size",
    ):
        monkeypatch.setattr(compilation, field, None)
    return served


def told(config: VllmConfig, width: int | None) -> tuple[int, Any]:
    """Rows of a request in a graph, and the sizes to capture."""
    _serve_graphs(config, width)
    assert config.diffusion_config is not None
    return (
        config.diffusion_config.canvas_length,
        config.compilation_config.cudagraph_capture_sizes,
    )


def test_a_cpu_reserves_nothing_for_graphs(served: VllmConfig):
    assert served.num_speculative_tokens == 1
    assert not served.compilation_config.cudagraph_capture_sizes


def test_sizes_are_multiples_of_a_block(captures: VllmConfig):
    width, sizes = told(captures, 32)
    assert width == 32
    assert sizes == [32 * n for n in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)]


def test_vllm_takes_these_sizes(captures: VllmConfig):
    _, sizes = told(captures, 32)
    captures.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    captures._set_cudagraph_sizes()
    assert captures.compilation_config.cudagraph_capture_sizes == sizes
    assert captures.compilation_config.max_cudagraph_capture_size == sizes[-1]


def test_few_requests_need_few_sizes(
    captures: VllmConfig, monkeypatch: pytest.MonkeyPatch
):
    """Twice the rows of all: each may be in its block's first step."""
    monkeypatch.setattr(captures.scheduler_config, "max_num_seqs", 2)
    assert told(captures, 4) == (4, [4, 8, 12, 16])


@pytest.mark.parametrize("width", [None, 1, WIDEST_GRAPH + 1])
def test_no_whole_graphs(captures: VllmConfig, width: int | None):
    assert told(captures, width) == (1, None)


@pytest.mark.parametrize("mode", [CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE])
def test_a_mode_without_whole_graphs(captures: VllmConfig, mode: CUDAGraphMode):
    captures.compilation_config.cudagraph_mode = mode
    assert told(captures, 32) == (1, None)


def test_eager(captures: VllmConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(captures.model_config, "enforce_eager", True)
    assert told(captures, 32) == (1, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [("cudagraph_capture_sizes", [7, 64]), ("max_cudagraph_capture_size", 64)],
)
def test_the_user_has_chosen_sizes(captures: VllmConfig, field: str, value: Any):
    setattr(captures.compilation_config, field, value)
    width, _ = told(captures, 32)
    assert width == 32
    assert getattr(captures.compilation_config, field) == value
    other = {"cudagraph_capture_sizes", "max_cudagraph_capture_size"} - {field}
    assert getattr(captures.compilation_config, other.pop()) is None


@pytest.mark.parametrize("width", [1, 4, 32, 100])
def test_padding_is_at_most_a_quarter(width: int):
    sizes = graph_sizes(width, 2048)
    assert sizes[0] == width and sizes[-1] <= 2048
    for size, following in pairwise(sizes):
        step = following - size
        assert step == width or 4 * step <= size
