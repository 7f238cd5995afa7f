# SPDX-License-Identifier: Apache-2.0
"""The engine: model families, canvas state, scheduler, sampler."""
