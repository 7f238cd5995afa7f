# SPDX-License-Identifier: Apache-2.0
"""Wing: watching a canvas fill, on a page and in a terminal (docs/watching.md)."""
