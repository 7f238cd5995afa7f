# SPDX-License-Identifier: Apache-2.0
"""What drafts for an autoregressive target: DEER's drafters, SpecDec++'s heads."""
