# SPDX-License-Identifier: Apache-2.0
"""Tables of tokens and tri-grams, counted in texts."""
