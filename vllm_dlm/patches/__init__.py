# SPDX-License-Identifier: Apache-2.0
"""What is wrapped of vLLM where it offers no seam; `ledger.py` explains the entries."""
