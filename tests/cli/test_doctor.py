# SPDX-License-Identifier: Apache-2.0
"""`vllm-dlm doctor` on a vLLM that fits, and on one that does not."""

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("vllm")

from vllm.platforms import vllm_version_matches_substr

from vllm_dlm.plugin import SUPPORTED_VLLM, TESTED_VLLM

on_cpu = pytest.mark.skipif(
    not vllm_version_matches_substr("cpu"), reason="needs a CPU build of vLLM"
)

UNFIT = """
from vllm.v1.worker.gpu import block_table, input_batch
from vllm.utils import cpu_triton_utils

def with_one_more(kernel):
    parameters = list(inspect.signature(kernel).parameters.values())
    one = inspect.Parameter("scale_ptr", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    def longer(*args, **kwargs): pass
    longer.__signature__ = inspect.Signature([*parameters[:3], one, *parameters[3:]])
    return longer

for module, name in (
    (input_batch, "_prepare_pos_seq_lens_kernel"),
    (cpu_triton_utils, "_rejection_random_sample_kernel_impl"),
):
    setattr(module, name, with_one_more(getattr(module, name)))
del block_table._compute_slot_mappings_kernel
sys.modules["vllm.entrypoints.launchers.launcher"] = None
sys.modules["triton"] = None
"""
"""Parameters that ours do not know, a kernel and a module that are gone, and one of an
optional package."""


def doctor(change: str) -> tuple[int, list[str]]:
    """Exit status and findings, one each, after `change` was made to vLLM."""
    code = (
        f"import inspect, sys\nimport vllm\n{change}\n"
        "from vllm_dlm.cli.command import main\nsys.exit(main(['doctor']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "COLUMNS": "1000"},
        capture_output=True,
        text=True,
    )
    findings = done.stdout.splitlines()
    assert findings, done.stderr
    return done.returncode, findings


@on_cpu
@pytest.mark.slow  # imports all that is imported anywhere, as the next one does
def test_a_vllm_that_fits():
    status, findings = doctor("vllm.__version__ = '0.33.7'")
    assert status == 0 and not [line for line in findings if line.startswith("BAD")]
    assert (
        f"ok  vllm: 0.33.7 (tested with: {', '.join(TESTED_VLLM)}; "
        f"accepted: {SUPPORTED_VLLM})" in findings
    )
    for subject in ("kernels", "tcmalloc", "bfloat16"):
        assert any(line.startswith(f"ok  {subject}: ") for line in findings)


@on_cpu
def test_a_vllm_that_does_not_fit():
    status, findings = doctor(UNFIT)
    assert status == 1
    problems = [
        line
        for line in findings
        # The missing module is one that wrapped symbols need as well.
        if line.startswith("BAD") and not line.startswith("BAD patched")
    ]
    said = (
        "BAD module: vllm_dlm.switching.server: Module.*vllm.entrypoints.launchers",
        "BAD kernel: .*_prepare_pos_seq_lens_kernel of vLLM .* has 'scale_ptr', unlike",
        "BAD kernel: .*has no kernel .*block_table._compute_slot_mappings_kernel",
        "BAD kernel: .*_rejection_random_sample_kernel_impl of .* scale_ptr.* begins",
    )
    assert len(problems) == len(said), problems
    for pattern in said:
        assert any(re.match(pattern, line) for line in problems), (pattern, problems)
    # What is optional is said, and is no fault.
    optional = "ok  module: vllm_dlm.kernels.triton_rows is not for here: triton comes"
    assert any(line.startswith(optional) for line in findings)
