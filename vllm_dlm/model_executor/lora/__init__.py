# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (LoRA) at serve time: what vLLM leaves to be done."""
