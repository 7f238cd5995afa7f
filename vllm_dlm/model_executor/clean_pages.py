# SPDX-License-Identifier: Apache-2.0
"""Pages of the KV cache are emptied before a request gets them, on a CPU.

A request whose logits are NaN leaves pages full of NaNs. vLLM's attention on a CPU
multiplies what stands in a page behind a request's own keys by 0, and that is NaN
again: the page's next owner would fail too. vLLM can empty new pages, and does so for
caches that need it. (On a GPU its kernels do not read what is behind the keys.)
"""

from __future__ import annotations

_serves = {"ours": False}
"""Whether this process runs a model of ours on a CPU."""


def note_device(device_type: str) -> None:
    """A model of ours is served on this device; before its pages are laid out."""
    if device_type == "cpu":
        _serves["ours"] = True


def are_needed() -> bool:
    """Whether pages must be empty when a request gets them, in this process."""
    return _serves["ours"]
