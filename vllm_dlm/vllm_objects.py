# SPDX-License-Identifier: Apache-2.0
"""Attributes that are set on single objects of vLLM, which offers no other way in.

Classes and functions of vLLM are wrapped in `patches/`; here one object is changed that
belongs to us or to an engine of ours. It fails where vLLM has nothing by that name, and
so would never look at what is set.
"""

from __future__ import annotations

from typing import Any


def replace(owner: Any, name: str, value: Any) -> None:
    """Set an attribute that an object of vLLM has already.

    Raises:
        RuntimeError: the object has nothing by that name.
    """
    if not hasattr(owner, name):
        raise RuntimeError(
            missing(f"{type(owner).__module__}:{type(owner).__name__}.{name}")
        )
    setattr(owner, name, value)


def missing(symbol: str) -> str:
    """One sentence for a `module:name` that this vLLM does not have."""
    from vllm import __version__

    return (
        f"vllm-dlm wraps {symbol}, which vLLM {__version__} does not have. "
        "Install a vLLM version that this vllm-dlm release supports."
    )
