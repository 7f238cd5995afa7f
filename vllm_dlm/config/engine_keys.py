# SPDX-License-Identifier: Apache-2.0
"""Keys of an engine's `additional_config` that say what the engine is for.

This file imports nothing, and so can be imported while vLLM is half imported.
"""

SPECULATION = "dlm_speculation"
"""The options of one of our speculative methods, for the worker."""

SWITCHING = "dlm_switching"
"""Which of a pair's two models the engine runs: "small" or "large"."""

RUNNER = "dlm_runner"
"""1 or 2: the model runner of vLLM's for which the engine was made ready."""

STEERING = "dlm_steering"
"""How a tuned model is steered by its base."""
