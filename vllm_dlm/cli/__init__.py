# SPDX-License-Identifier: Apache-2.0
"""The `vllm-dlm` command."""

from vllm_dlm.cli.command import main

__all__ = ["main"]
