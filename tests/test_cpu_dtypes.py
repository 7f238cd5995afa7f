# SPDX-License-Identifier: Apache-2.0
"""In which type a CPU serves what is stored in float32."""

import pytest

pytest.importorskip("vllm")

from vllm.platforms import vllm_version_matches_substr

if not vllm_version_matches_substr("cpu"):
    pytest.skip("needs a CPU build of vLLM", allow_module_level=True)

import torch


@pytest.mark.parametrize(
    ("capabilities", "first"),
    [
        ({"architecture": "x86_64", "avx2": True}, torch.float32),
        (
            {"architecture": "x86_64"}
            | dict.fromkeys(("avx512_bw", "avx512_vl", "avx512_dq"), True),
            torch.bfloat16,
        ),
        ({"architecture": "aarch64"}, torch.bfloat16),
    ],
    ids=["without AVX-512", "with AVX-512", "no x86"],
)
def test_what_auto_makes_of_checkpoints_in_float32(monkeypatch, capabilities, first):
    """And those in bfloat16 stay what they are: float32 would take twice the memory."""
    from vllm.config.model import _resolve_auto_dtype

    from vllm_dlm.platform import DlmCpuPlatform

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr("vllm.config.model.current_platform", DlmCpuPlatform())
    for stored, served in ((torch.float32, first), (torch.bfloat16, torch.bfloat16)):
        made = _resolve_auto_dtype("llada", stored, is_pooling_model=False)
        assert made == served
