# SPDX-License-Identifier: Apache-2.0
"""Measurements of the strategies on llada-tiny; see README.md beside this file."""
