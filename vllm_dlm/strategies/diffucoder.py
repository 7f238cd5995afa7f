# SPDX-License-Identifier: Apache-2.0
"""DiffuCoder's decoding: Dream's, scored by the distribution that tokens come from.

Dream's schedule says how many masks a step writes (`dream.py`), by default those of
least entropy. Here scores are those of the distribution after temperature and top-k/p,
as in the published code, so that the temperature moves the order of the tokens as well
as the tokens: the lower it is, the more of them are equally certain, and of these the
leftmost come first. Without a temperature it is `dream`.
Source: DiffuCoder, arXiv 2506.20639, and apple/ml-diffucoder's code.
"""

from __future__ import annotations

from vllm_dlm.strategies.dream import Dream


class DiffuCoder(Dream):
    """Dream's schedule, scored after temperature and top-k/p."""

    name = "diffucoder"
    paper = "arXiv 2506.20639 (DiffuCoder)"
    summary = "dream, with the scores of the distribution that is drawn from"
    measures = "drawn"
