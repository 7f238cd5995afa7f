# SPDX-License-Identifier: Apache-2.0
"""Jacobi decoding: the model's guesses behind a rejection are its next draft."""
