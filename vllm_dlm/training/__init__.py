# SPDX-License-Identifier: Apache-2.0
"""Training of the built-in models, of what drafts, and counting of tokens.

`tiny` makes the built-in models, `drafters` what drafts for a target (DEER's drafters,
SpecDec++'s heads), `counts` the tables that the strategy pc and ADED read. `loop` runs
the steps of all trainings, `cards` has what the model cards share.
"""
