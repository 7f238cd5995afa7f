# SPDX-License-Identifier: Apache-2.0
"""ParallelBench (arXiv 2510.04767): what it costs to write tokens together.

The generators are written from the paper's description; questions are worded anew, and
names are others. docs/parallelbench.md
"""
