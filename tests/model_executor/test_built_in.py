# SPDX-License-Identifier: Apache-2.0
"""The built-in models' files are those of their classes."""

import pytest
from model_cases import load
from safetensors.torch import load_file

from vllm_dlm.config import aliases

BUILT_IN = [
    name
    for name, alias in aliases.ALIASES.items()
    if alias.built_in and alias.family.is_diffusion
]


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_tensor_is_used(build, name):
    from pathlib import Path

    folder = Path(aliases.resolve(name))
    load(build(folder), load_file(folder / "model.safetensors"))
