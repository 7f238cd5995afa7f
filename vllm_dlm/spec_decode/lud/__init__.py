# SPDX-License-Identifier: Apache-2.0
"""LUD: a model that was trained for it drafts for itself behind pad tokens."""
