# SPDX-License-Identifier: Apache-2.0
"""Steered decoding, SVDecode (arXiv 2509.15888): a tuned model, and the model it was
tuned from, write one text.

Each next token's logits are those of the tuned model, moved along the direction in
which its distribution most quickly comes nearer to the base's, or away from it.
`rule.py` is the formula, `model.py` both models as one of vLLM's, `front_end.py` the
flags. The paper has no public code.
"""
