# SPDX-License-Identifier: Apache-2.0
"""From a user's speculative config to what vLLM knows: called before its own check.

DEER, SpecDec++ and DEL go as vLLM's "draft_model", whose KV pages and verification they
use, ADED as its "custom_class"; the worker class puts our drafter in. All run on model
runner V1 (`patches.py`), synchronously: how long a draft is depends on its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm import envs
from vllm.logger import init_logger

from vllm_dlm import aliases
from vllm_dlm.spec_decode import options as spec

logger = init_logger(__name__)

WORKER = "vllm_dlm.spec_decode.worker.SpeculativeWorker"


def translate(args: Any) -> bool:
    """Adapt `EngineArgs` in place; whether they ask for a method of ours.

    Raises:
        ValueError: an invalid option, or one of vLLM's that does not go with it.
    """
    asked = args.speculative_config
    if not spec.is_ours(asked):
        return False
    method = asked["method"]
    options = spec.parse(asked)
    if isinstance(options, spec.WithDrafter):
        folder = aliases.resolve(options.model, options.revision, args.hf_token)
        options = options.model_copy(update={"model": folder})
    _refuse(args, method)
    args.speculative_config = _vllm_config(args, method, options)
    args.additional_config = {
        **(args.additional_config or {}),
        spec.CONFIG_KEY: spec.to_plain(method, options),
    }
    args.worker_cls = WORKER
    args.async_scheduling = False
    logger.info(
        "Speculative decoding by %s (%s): vLLM's %s path with the worker class %s, "
        "model runner V1, synchronous scheduling.",
        method,
        options.paper,
        args.speculative_config["method"],
        WORKER.rpartition(".")[2],
    )
    return True


def _refuse(args: Any, method: str) -> None:
    if args.worker_cls not in ("auto", WORKER):
        raise ValueError(
            f"speculative method {method!r} brings its own worker class, and "
            f"worker_cls is {args.worker_cls!r}: leave it out"
        )
    if args.async_scheduling:
        raise ValueError(
            f"speculative method {method!r} drafts when a step's tokens are known: "
            "leave out --async-scheduling"
        )
    if envs.VLLM_USE_V2_MODEL_RUNNER:
        raise ValueError(
            f"speculative method {method!r} runs on model runner V1: unset "
            "VLLM_USE_V2_MODEL_RUNNER"
        )
    if args.pipeline_parallel_size > 1:
        raise ValueError(
            f"speculative method {method!r} does not support pipeline parallelism yet; "
            "use --tensor-parallel-size"
        )
    if not isinstance(args.additional_config, Mapping | None):
        raise ValueError(
            f"speculative method {method!r} needs additional_config to be a dict, not "
            f"{type(args.additional_config).__name__}"
        )


def _vllm_config(args: Any, method: str, options: spec.Options) -> dict[str, Any]:
    """The dict that vLLM's `SpeculativeConfig` takes."""
    most = options.num_speculative_tokens
    config: dict[str, Any] = {
        "num_speculative_tokens": most,
        # "Verification is not of one length": no padding by tokens that nobody
        # drafted, and no CUDA graph of one length.
        "num_speculative_tokens_per_batch_size": [(1, 1, most)],
    }
    if method == "aded":
        path = options.proposer.replace(":", ".")
        return {**config, "method": "custom_class", "model": path}
    config |= {"method": "draft_model", "model": args.model}
    if isinstance(options, spec.WithDrafter):
        shared = set(spec.WithDrafter.model_fields)
        config |= options.model_dump(include=shared, exclude_none=True)
    config.setdefault("draft_tensor_parallel_size", args.tensor_parallel_size)
    # Each token's distribution is attached: more are accepted at temperature > 0.
    # DEL's stop rule looks at the token it may drop, which is lossless only without.
    if method != "del":
        config["draft_sample_method"] = "probabilistic"
    return config


def check(config: Any) -> None:
    """Refuse a drafter that does not fit, before anything is loaded.

    Args:
        config: the finished `VllmConfig`. vLLM has compared the vocabularies' sizes.

    Raises:
        ValueError: DEER's is no diffusion model; or its token ids mean other tokens
            than the target's, one of which the message names.
    """
    speculative = config.speculative_config
    if config.additional_config[spec.CONFIG_KEY]["method"] == "deer":
        from vllm_dlm.spec_decode.deer import check_drafter

        hf_config = speculative.draft_model_config.hf_config
        check_drafter(hf_config, speculative.num_speculative_tokens)
    target, draft = config.model_config, speculative.draft_model_config
    if target.skip_tokenizer_init or draft.model == target.model:
        return
    from vllm.tokenizers.registry import get_tokenizer

    names = (target.tokenizer, draft.model)
    theirs, ours = (
        get_tokenizer(name, trust_remote_code=target.trust_remote_code).get_vocab()
        for name in names
    )
    for token, number in theirs.items():
        if ours.get(token) != number:
            raise ValueError(
                f"the drafter {draft.model!r} does not have the target's vocabulary: "
                f"token {token!r} is {number} for the target and "
                f"{ours.get(token, 'missing')} for the drafter. A drafter must be "
                "trained with the target's tokenizer"
            )


def check_request(
    extra_args: Mapping[str, Any] | None, speculative_config: Any
) -> None:
    """Refuse a request whose own draft limit cannot be honoured (HTTP 400).

    Raises:
        VLLMValidationError: the limit is invalid, or the engine does not speculate.
    """
    if spec.REQUEST_KEY not in (extra_args or {}):
        return
    from vllm.exceptions import VLLMValidationError

    if speculative_config is None:
        raise VLLMValidationError(
            f"{spec.REQUEST_KEY}: this engine has no speculative decoding; start it "
            "with --speculative-config, or remove it from the request"
        )
    try:
        spec.request_limit(extra_args, speculative_config.num_speculative_tokens)
    except ValueError as error:
        raise VLLMValidationError(str(error)) from None
