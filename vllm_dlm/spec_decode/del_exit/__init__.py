# SPDX-License-Identifier: Apache-2.0
"""DEL (arXiv 2504.05598): the target's own lower layers draft."""
