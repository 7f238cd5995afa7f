# SPDX-License-Identifier: Apache-2.0
"""The searches by name; other packages add theirs through an entry point."""

from __future__ import annotations

from vllm_dlm.registry import Registry
from vllm_dlm.search.base import Driver

SEARCHES: Registry[type[Driver]] = Registry(
    "search",
    {
        "best_first": "vllm_dlm.search.best_first:BestFirst",
        "best_of_n": "vllm_dlm.search.best_of_n:BestOfN",
        "lookahead": "vllm_dlm.search.lookahead:Lookahead",
        "mcts": "vllm_dlm.search.mcts:Mcts",
        "particles": "vllm_dlm.search.particles:Particles",
        "vote": "vllm_dlm.search.vote:Vote",
    },
    group="vllm_dlm.searches",
)
