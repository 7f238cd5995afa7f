# SPDX-License-Identifier: Apache-2.0
"""Model families: one file states one family's difference from a vLLM class."""
