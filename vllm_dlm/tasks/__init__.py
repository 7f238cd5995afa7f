# SPDX-License-Identifier: Apache-2.0
"""Small problems with checkable answers, and how many of them a decoder solves.

The built-in models are trained and evaluated on them; the demo and the bench ask them.
"""
