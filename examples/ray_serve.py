# SPDX-License-Identifier: Apache-2.0
"""Several engines behind one address: Ray Serve, with a strategy per request.

python examples/ray_serve.py [model] [engines] [port]

Starts the service, asks it, and ends. A request is {"prompt": ..., "dlm": {options}}.
Every engine has a GPU of its own; docs/scaling.md says how it runs without any, and on
many machines.
"""

import sys
import uuid

import httpx
from ray import serve
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from vllm import AsyncEngineArgs, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_dlm.ray_cluster import connect


@serve.deployment(ray_actor_options={"num_gpus": 1})
class Engine:
    def __init__(self, model: str) -> None:
        # Eager starts sooner; without it, a GPU decodes faster.
        arguments = AsyncEngineArgs(model, enforce_eager=True)
        self.engine = AsyncLLM.from_engine_args(arguments)

    async def check_health(self) -> None:
        await self.engine.check_health()  # Serve replaces an engine that has failed

    async def __call__(self, request: Request) -> PlainTextResponse:
        body = await request.json()
        options = {"dlm": body.get("dlm", {})}
        sampling = SamplingParams(temperature=0, max_tokens=64, extra_args=options)
        try:
            steps = self.engine.generate(body["prompt"], sampling, uuid.uuid4().hex)
            texts = [step.outputs[0].text async for step in steps]
        except VLLMValidationError as error:
            return PlainTextResponse(str(error), status_code=400)
        return PlainTextResponse(texts[-1])


def main(model: str = "llada-tiny", engines: str = "2", port: str = "8000") -> None:
    connect(devices=int(engines))
    serve.start(http_options={"port": int(port)})
    serve.run(Engine.options(num_replicas=int(engines)).bind(model))
    for strategy in ("threshold", "entropy", "none-such"):
        body = {"prompt": "Sort [Eva, Dan, Ada]", "dlm": {"strategy": strategy}}
        reply = httpx.post(f"http://127.0.0.1:{port}/", json=body, timeout=60)
        print(f"{strategy}: {reply.status_code} {reply.text}")
    serve.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
