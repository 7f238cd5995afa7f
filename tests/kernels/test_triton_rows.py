# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels: on a GPU; in Triton's interpreter without one; and compiled."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiers import fast

from vllm_dlm.kernels.class_stats import (
    PIECE,
    TokenClasses,
    _draws_reference,
    class_stats_reference,
)
from vllm_dlm.kernels.draw import _plain_draw_reference, draw, row_key
from vllm_dlm.kernels.token_stats import TokenStats, finished, token_stats

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NEEDS_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton cannot be imported"
)


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "interpreter"])
def device(request):
    if request.param == "interpreter":
        if not INTERPRETED:
            pytest.skip("runs in the subprocess of test_in_tritons_interpreter")
        return torch.device("cpu")
    return torch.device("cuda")


@NEEDS_TRITON
@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
@pytest.mark.parametrize("tier", fast("not slow", of=("not slow", "slow")))
def test_in_tritons_interpreter(tier):
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-k", "interpreter"]
    finished = subprocess.run(
        [*command, "-m", tier, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"{NUM_CASES[tier]} passed, 1 skipped" in finished.stdout, finished.stdout


QUICK = [(torch.float16, 9), (torch.float32, 3001)]
CASES = fast(*QUICK, of=[
    (torch.bfloat16, 1), (torch.float32, 2), *QUICK, (torch.bfloat16, 32_769),
])  # fmt: skip
NUM_CASES = {"not slow": 3 * len(QUICK), "slow": 3 * (len(CASES) - len(QUICK)) + 1}


def rows_for(odd_logits, vocab, dtype, device):
    logits = odd_logits(vocab, 6, vocab, dtype)
    logits[4] = -torch.inf
    logits[5] = 1.0  # all tokens tie
    return logits.to(device)


@pytest.mark.parametrize(("dtype", "vocab"), CASES)
def test_statistics(device, odd_logits, oracle, assert_true, dtype, vocab):
    from vllm_dlm.kernels import triton_rows

    logits = rows_for(odd_logits, vocab, dtype, device)
    bans = torch.tensor([-1, 0, vocab - 1, vocab // 2, 0, 0], device=device)
    want = oracle(logits.cpu(), bans.tolist())
    got = TokenStats(*triton_rows.token_stats(logits, bans, True, True))
    assert_true(got, want)
    parts = triton_rows.row_parts(logits, bans)
    assert_true(finished(parts, True, True), want)
    bare = TokenStats(*triton_rows.token_stats(logits, bans, False, False))
    assert bare.entropy is None
    assert bare.margin is None


@pytest.mark.parametrize(("dtype", "vocab"), CASES)
def test_draws(device, odd_logits, dtype, vocab):
    from vllm_dlm.kernels import triton_rows

    logits = rows_for(odd_logits, vocab, dtype, device)
    rows = torch.tensor([5, 0, 3, 2, 1], device=device)
    bans = torch.tensor([-1, 0, vocab - 1, vocab // 2, 0], device=device)
    clean = logits[rows].float().nan_to_num(nan=-torch.inf)
    top = clean.amax(dim=1)
    top = torch.where(top.isfinite(), top, 0.0)
    settings = (
        bans,
        top,
        torch.tensor([1.0, 0.5, 2.0, 1.0, 0.7], device=device),
        torch.tensor([0.0, 0.1, 0.5, 0.0, 0.01], device=device).log(),
        row_key(rows, rows + 7, rows * 0),
    )
    # As of the rank that holds the tokens from 1000 on.
    scores, columns = triton_rows.draw_rows(logits, rows, *settings, 1000)
    want_scores, want_columns = _plain_draw_reference(logits[rows], *settings, 1000)
    torch.testing.assert_close(scores, want_scores, rtol=2e-6, atol=2e-6)
    drawn = want_scores.isfinite()
    assert torch.equal(columns[drawn], want_columns[drawn])


@pytest.mark.parametrize(("dtype", "vocab"), CASES)
def test_classes_of_tokens(device, odd_logits, dtype, vocab):
    """Statistics and draws: a class of most tokens, an empty one, some small ones."""
    from vllm_dlm.kernels import triton_rows

    logits = rows_for(odd_logits, vocab, dtype, device)
    class_of = np.arange(vocab) % 7 - 1
    class_of[vocab // 3 :] = 2
    classes = TokenClasses.of(class_of, 8, device)
    lists = (
        classes.columns,
        classes.tokens,
        classes.pieces,
        classes.first_piece,
        PIECE,
    )
    parts = triton_rows.class_parts(logits, *lists, 1 / 0.7)
    want = class_stats_reference(logits, classes, 1 / 0.7)
    assert torch.equal(parts[..., 0], want[..., 0])
    # Sums relative to an infinite logit are of no meaning.
    usable = want[..., 0] < torch.inf
    torch.testing.assert_close(parts[usable], want[usable], rtol=2e-6, atol=2e-5)
    rows = torch.arange(6, device=device)
    settings = (
        torch.zeros(6, device=device),
        torch.full((6,), 0.7, device=device),
        row_key(rows, rows + 7, rows * 0),
    )
    scores, places = triton_rows.class_draws(logits, *lists, *settings)
    want_scores, want_places = _draws_reference(logits, classes, *settings)
    torch.testing.assert_close(scores, want_scores, rtol=2e-6, atol=2e-5)
    drawn = want_scores.isfinite()
    assert torch.equal(places[drawn], want_places[drawn])


@pytest.mark.slow
def test_a_row_does_not_depend_on_the_others(device, odd_logits):
    from vllm_dlm.kernels import triton_rows

    logits = rows_for(odd_logits, 20_000, torch.bfloat16, device)
    bans = torch.full((6,), -1, device=device)
    whole = triton_rows.row_parts(logits, bans)
    for row in range(6):
        alone = triton_rows.row_parts(logits[row : row + 1], bans[:1])
        torch.testing.assert_close(alone[0], whole[row], rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_cuda_is_served_by_triton(odd_logits, oracle, assert_true):
    logits = odd_logits(3, 32, 126_464, torch.bfloat16)
    got = token_stats(logits.cuda(), True, True, ban_id=5)
    assert_true(got, oracle(logits, [5] * 32))
    one = torch.ones(32)
    settings = {
        "temperature": one, "top_k": one.long() * 0, "top_p": one, "min_p": one * 0,
        "seed": one.long(), "position": torch.arange(32), "step": one.long(),
    }  # fmt: skip
    on_gpu = {name: values.cuda() for name, values in settings.items()}
    there = draw(logits.cuda(), got.argmax, **on_gpu, ban_id=5)
    assert torch.equal(
        there.cpu(), draw(logits, got.argmax.cpu(), **settings, ban_id=5)
    )


@NEEDS_TRITON
@pytest.mark.skipif(INTERPRETED, reason="compiles nothing")
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_kernels_compile_for_a_gpu(dtype):
    """What the interpreter runs may still not compile; for that no GPU is needed."""
    import triton
    from triton.backends.compiler import GPUTarget

    from vllm_dlm.kernels import triton_rows

    def compiled(kernel, pointers: dict[str, str], **constants) -> str:
        signature = {
            name: "constexpr" if name in constants else pointers.get(name, "i32")
            for name in kernel.arg_names
        }
        source = triton.compiler.ASTSource(kernel, signature, constants)
        return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

    pieces = compiled(
        triton_rows._piece_kernel,
        {"logits": f"*{dtype}", "bans": "*i64", "parts": "*fp64"},
        stride=1, PIECE=16384, GROUPS=256, WIDTH=8,
    )  # fmt: skip
    assert "ex2.approx" in pieces
    floats = ("logprob_out", "confidence_out", "entropy_out", "margin_out")
    outputs = dict.fromkeys(floats, "*fp32") | {
        "parts": "*fp64", "merged": "*fp64", "logsumexp_out": "*fp64",
        "argmax_out": "*i64",
    }  # fmt: skip
    for finish in (True, False):
        flags = dict.fromkeys(("FINISH", "ENTROPY", "MARGIN"), finish)
        assert "st.global" in compiled(
            triton_rows._merge_kernel, outputs, **flags, PIECES=8
        )
    draws = compiled(
        triton_rows._draw_kernel,
        dict.fromkeys(("rows", "bans", "keys", "columns"), "*i64")
        | dict.fromkeys(("tops", "temperatures", "cuts", "scores"), "*fp32")
        | {"logits": f"*{dtype}"},
        stride=1, PIECE=16384, BLOCK=1024,
    )  # fmt: skip
    assert "mul.lo.s64" in draws
    lists = {"columns": "*i32", "tokens": "*i32", "pieces": "*i64", "first": "*i64"}
    of_classes = compiled(
        triton_rows._class_piece_kernel,
        lists | {"logits": f"*{dtype}", "parts": "*fp64", "scale": "fp32"},
        stride=1, PIECE=1024,
    )  # fmt: skip
    assert "ex2.approx" in of_classes
    assert "st.global" in compiled(
        triton_rows._class_merge_kernel,
        lists | {"parts": "*fp64", "merged": "*fp64"},
    )
    assert "mul.lo.s64" in compiled(
        triton_rows._class_draw_kernel,
        lists
        | dict.fromkeys(("keys", "chosen"), "*i64")
        | dict.fromkeys(("tops", "temperatures", "scores"), "*fp32")
        | {"logits": f"*{dtype}"},
        stride=1, PIECE=1024,
    )  # fmt: skip
    assert "st.global" in compiled(
        triton_rows._class_best_kernel,
        lists
        | dict.fromkeys(("places", "place_out"), "*i64")
        | dict.fromkeys(("scores", "best_out"), "*fp32"),
    )
