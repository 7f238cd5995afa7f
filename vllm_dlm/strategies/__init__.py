# SPDX-License-Identifier: Apache-2.0
"""Decoding strategies: one file is one decoding rule is one paper.

`STRATEGIES` maps names to classes without importing them. A third party adds a
strategy through the entry-point group `vllm_dlm.strategies`.
"""

from vllm_dlm.registry import Registry
from vllm_dlm.strategies.base import Strategy

STRATEGIES: Registry[type[Strategy]] = Registry(
    "decoding strategy",
    {
        "dream": "vllm_dlm.strategies.dream:Dream",
        "factor": "vllm_dlm.strategies.factor:Factor",
        "learn2pd": "vllm_dlm.strategies.learn2pd:Learn2PD",
        "static": "vllm_dlm.strategies.static:Static",
        "threshold": "vllm_dlm.strategies.threshold:Threshold",
    },
    group="vllm_dlm.strategies",
)

__all__ = ["STRATEGIES", "Strategy"]
