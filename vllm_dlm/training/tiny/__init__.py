# SPDX-License-Identifier: Apache-2.0
"""The built-in models llada-tiny, llada-forms, llama-tiny and llama-tiny-draft."""
