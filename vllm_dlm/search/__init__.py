# SPDX-License-Identifier: Apache-2.0
"""Search: ask a model for several texts, or token by token, and keep the best.

`run` searches for all prompts at once, with a model in this process or behind an
OpenAI endpoint. A driver is a generator of requests (`base.py`), the pump runs all of
them together (`pump.py`). docs/search.md
"""

from vllm_dlm.search.base import (
    Branch,
    Budget,
    Candidate,
    Complete,
    Driver,
    Extend,
    Result,
    Score,
    Step,
    Task,
    Text,
)
from vllm_dlm.search.endpoint import Endpoint
from vllm_dlm.search.registry import SEARCHES
from vllm_dlm.search.runner import run
from vllm_dlm.search.threshold import learn_threshold, read_entropies

__all__ = [
    "SEARCHES",
    "Branch",
    "Budget",
    "Candidate",
    "Complete",
    "Driver",
    "Endpoint",
    "Extend",
    "Result",
    "Score",
    "Step",
    "Task",
    "Text",
    "learn_threshold",
    "read_entropies",
    "run",
]
