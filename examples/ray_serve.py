# SPDX-License-Identifier: Apache-2.0
"""Several engines behind one address: Ray Serve, a strategy per request.

python examples/ray_serve.py [model] [engines]

It asks itself three questions and ends. `serve run examples.ray_serve:app` serves on.
Runs without a GPU as well; see docs/scaling.md, also for clusters.
"""

import sys
import uuid

import httpx
from ray import serve
from vllm import AsyncEngineArgs, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
