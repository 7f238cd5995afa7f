# SPDX-License-Identifier: Apache-2.0
"""The tasks of llada-forms: JSON from sentences, forms with holes, calls of tools."""
