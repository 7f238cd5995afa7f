# SPDX-License-Identifier: Apache-2.0
"""Rows times adapters' matrices on a CPU, against a loop over rows."""

from types import SimpleNamespace

import pytest
import torch

from vllm_dlm.model_executor.lora.cpu_rows import LoraRows

PLACES = [1, 1, -1, 0, -1, -1, 1, 2, 2, 0]
INPUTS, RANK, WIDTHS = 6, 3, (5, 2)


@pytest.fixture
def rows() -> LoraRows:
    """Of a batch whose rows have the adapters 11, 12, 13 in places 0, 1, 2."""
    wrapper = LoraRows(16, max_batches=16, device="cpu")
    # What a wider batch before has left behind.
    name(wrapper, [11] * 16)
    name(wrapper, [place + 11 if place >= 0 else 0 for place in PLACES])
    return wrapper


def name(wrapper: LoraRows, adapters: list[int]) -> None:
    mapping = SimpleNamespace(
        index_mapping=adapters, prompt_mapping=adapters, is_prefill=True
    )
    wrapper.update_metadata(mapping, [11, 12, 13], 4, 100)


def draw(seed: int = 0) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    a = tuple(torch.randn(3, 1, RANK, INPUTS) for _ in WIDTHS)
    b = tuple(torch.randn(3, 1, width, RANK) for width in WIDTHS)
    return torch.randn(len(PLACES), INPUTS), torch.randn(len(PLACES), 7), a, b


def by_rows(x, y, a, b, scale):
    y = y.clone()
    for row, place in enumerate(PLACES):
        start = 0
        for one, other, width in zip(a, b, WIDTHS, strict=True):
            if place >= 0:
                change = other[place, 0] @ (scale * (one[place, 0] @ x[row]))
                y[row, start : start + width] += change
            start += width
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_gets_its_own_adapter_and_others_none(rows, dtype):
    x, y, a, b = draw()
    wanted = by_rows(x, y, a, b, 0.5)
    x, y = x.to(dtype), y.to(dtype)
    a, b = (tuple(one.to(dtype) for one in ones) for ones in (a, b))
    before = y.clone()
    rows.add_lora_linear(y, x, a, b, 0.5, WIDTHS)
    far = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(y.float(), wanted, atol=far, rtol=far)
    none = [row for row, place in enumerate(PLACES) if place < 0]
    assert torch.equal(y[none], before[none])
    assert not torch.equal(y, before)


def test_rows_behind_a_batch_have_no_adapter(rows):
    x, y, a, b = draw()
    x, y = (torch.cat([one, one[:4]]) for one in (x, y))
    before = y.clone()
    rows.add_lora_linear(y, x, a, b, 1.0, WIDTHS)
    torch.testing.assert_close(y[:10], by_rows(x, before[:10], a, b, 1.0))
    assert torch.equal(y[10:], before[10:])


def test_a_compiled_network_sees_each_batchs_adapters(rows):
    """Traced once, in whole; by the batch that was there."""
    x, y, a, b = draw()

    @torch.compile(backend="eager", fullgraph=True)
    def compute(x, y):
        y = y + 0
        rows.add_lora_linear(y, x, a, b, 1.0, WIDTHS)
        return y

    torch.testing.assert_close(compute(x, y), by_rows(x, y, a, b, 1.0))
    name(rows, [0] * len(PLACES))
    assert torch.equal(compute(x, y), y)
