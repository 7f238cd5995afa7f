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
        "cad": "vllm_dlm.strategies.cad:Cad",
        "dream": "vllm_dlm.strategies.dream:Dream",
        "eb": "vllm_dlm.strategies.eb:EntropyBounded",
        "entropy": "vllm_dlm.strategies.entropy:Entropy",
        "factor": "vllm_dlm.strategies.factor:Factor",
        "hierarchy": "vllm_dlm.strategies.hierarchy:Hierarchy",
        "learn2pd": "vllm_dlm.strategies.learn2pd:Learn2PD",
        "localleap": "vllm_dlm.strategies.localleap:LocalLeap",
        "static": "vllm_dlm.strategies.static:Static",
        "threshold": "vllm_dlm.strategies.threshold:Threshold",
    },
    group="vllm_dlm.strategies",
)

__all__ = ["STRATEGIES", "Strategy"]
