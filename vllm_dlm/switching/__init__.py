# SPDX-License-Identifier: Apache-2.0
"""Entropy-adaptive decoding (arXiv 2502.06833): two models write one text.

The small model writes until it grows unsure, the large one until it is sure again.
Each has an engine of its own; `router.py` (offline) and `serve_pair.py` (HTTP) carry
the text from one to the other. `entropy.py` has the rule, `entropy_stop.py` ends a
model's turn inside its engine. The paper has no public code: what it leaves open is
said there.
"""
