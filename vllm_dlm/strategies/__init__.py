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
        "ass": "vllm_dlm.strategies.ass:Ass",
        "bacd": "vllm_dlm.strategies.bacd:Bacd",
        "cad": "vllm_dlm.strategies.cad:Cad",
        "credit": "vllm_dlm.strategies.credit:Credit",
        "diffucoder": "vllm_dlm.strategies.diffucoder:DiffuCoder",
        "dmax": "vllm_dlm.strategies.dmax:DMax",
        "dream": "vllm_dlm.strategies.dream:Dream",
        "eb": "vllm_dlm.strategies.eb:EntropyBounded",
        "entropy": "vllm_dlm.strategies.entropy:Entropy",
        "eoser": "vllm_dlm.strategies.eoser:Eoser",
        "ete": "vllm_dlm.strategies.ete:Ete",
        "factor": "vllm_dlm.strategies.factor:Factor",
        "freedave": "vllm_dlm.strategies.freedave:FreeDave",
        "hierarchy": "vllm_dlm.strategies.hierarchy:Hierarchy",
        "joint": "vllm_dlm.strategies.joint:Joint",
        "klass": "vllm_dlm.strategies.klass:Klass",
        "learn2pd": "vllm_dlm.strategies.learn2pd:Learn2PD",
        "levenshtein": "vllm_dlm.strategies.levenshtein:Levenshtein",
        "linear_spec": "vllm_dlm.strategies.linear_spec:LinearSpec",
        "localleap": "vllm_dlm.strategies.localleap:LocalLeap",
        "lopa": "vllm_dlm.strategies.lopa:Lopa",
        "multi_block": "vllm_dlm.strategies.multi_block:MultiBlock",
        "pc": "vllm_dlm.strategies.pc:PcSampler",
        "prophet": "vllm_dlm.strategies.prophet:Prophet",
        "renoise": "vllm_dlm.strategies.renoise:Renoise",
        "replay": "vllm_dlm.strategies.replay:Replay",
        "saber": "vllm_dlm.strategies.saber:Saber",
        "slowfast": "vllm_dlm.strategies.slowfast:SlowFast",
        "smooth": "vllm_dlm.strategies.smooth:Smooth",
        "static": "vllm_dlm.strategies.static:Static",
        "threshold": "vllm_dlm.strategies.threshold:Threshold",
    },
    group="vllm_dlm.strategies",
)

__all__ = ["STRATEGIES", "Strategy"]
