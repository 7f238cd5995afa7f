# SPDX-License-Identifier: Apache-2.0
"""The parts of `benchmarks.gpu_check`, each run in a process of its own."""
