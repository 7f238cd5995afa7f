# SPDX-License-Identifier: Apache-2.0
"""The built-in models: how each is made, measured and described."""
