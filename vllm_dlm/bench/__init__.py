# SPDX-License-Identifier: Apache-2.0
"""`vllm-dlm bench`: our engine and others on the same work, in one run.

`command` is what the command line calls. It lays out `cells` (an engine, a strategy, a
cache policy, a concurrency), starts each engine once, has `measure` run its cells, and
keeps every result in a JSON file that a later run resumes. Engines are `served` (vLLM:
ours, or an autoregressive model), `plain` (a PyTorch loop) and whatever `engine.Engine`
a user's file holds.
"""
