# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding of autoregressive models: by diffusion, or adaptive."""
