# SPDX-License-Identifier: Apache-2.0
"""Wing: how good a model's answers are, and what its log-likelihoods are.

`vllm-dlm eval` (command.py) asks tasks with checkable answers; `loglikelihood` says how
probable given texts are. docs/evaluation.md
"""
