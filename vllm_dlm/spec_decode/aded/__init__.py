# SPDX-License-Identifier: Apache-2.0
"""ADED (arXiv 2407.12021): tri-grams draft, and adapt to the text."""
