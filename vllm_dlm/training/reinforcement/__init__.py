# SPDX-License-Identifier: Apache-2.0
"""Training by rewards: roll-outs, what they earn, and the updates that follow."""
