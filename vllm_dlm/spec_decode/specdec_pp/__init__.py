# SPDX-License-Identifier: Apache-2.0
"""SpecDec++ (arXiv 2405.19715): a head says when a draft ends."""
