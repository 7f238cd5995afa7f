# SPDX-License-Identifier: Apache-2.0
"""Wing: autoregressive models that compute some of their layers, always the same."""
