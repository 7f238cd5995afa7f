# SPDX-License-Identifier: Apache-2.0
"""The command `vllm-dlm`: its subcommands, doctor, and the demo."""
