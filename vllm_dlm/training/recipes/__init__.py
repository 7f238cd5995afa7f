# SPDX-License-Identifier: Apache-2.0
"""How a model is trained for a decoding rule: one file is one recipe."""
