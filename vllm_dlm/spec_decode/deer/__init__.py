# SPDX-License-Identifier: Apache-2.0
"""DEER (arXiv 2512.15176): a diffusion language model drafts a block at once."""
