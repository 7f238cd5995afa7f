# SPDX-License-Identifier: Apache-2.0
"""From a user's speculative config to what vLLM knows: called before its own check.

DEER, SpecDec++ and DEL go as vLLM's "draft_model", whose KV pages and verification they
use, ADED as its "custom_class"; the worker class puts our drafter in. All run on model
runner V1 (`patches/cpu_runner.py`), synchronously: the length of a draft depends on its
tokens. The core finds this module by its name (`entrypoints/wings.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.logger import init_logger

from vllm_dlm.config import aliases
from vllm_dlm.config.engine_keys import SPECULATION
from vllm_dlm.spec_decode import options as spec

if TYPE_CHECKING:
    from vllm.config import SchedulerConfig, SpeculativeConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams

logger = init_logger(__name__)

WORKER = "vllm_dlm.spec_decode.worker.SpeculativeWorker"

REQUEST_KEYS = {spec.REQUEST_KEY: "--speculative-config"}
"""See `entrypoints/wings.py`."""


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse wrong options of a method of ours, before anything starts.

    Raises:
        ValueError: unknown or invalid options; names the valid ones.
    """
    asked = getattr(args, "speculative_config", None)
    if asked and spec.is_ours(asked):
        spec.parse(asked)


def translate(args: EngineArgs) -> bool:
    """Adapt an engine's arguments in place; whether they ask for a method of ours.

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
        SPECULATION: spec.to_plain(method, options),
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


def _refuse(args: EngineArgs, method: str) -> None:
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


def _vllm_config(
    args: EngineArgs, method: str, options: spec.Options
) -> dict[str, Any]:
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


def check(config: VllmConfig) -> None:
    """Refuse a drafter that does not fit, before anything is loaded.

    A token budget that full drafts of all requests exceed gives a warning.

    Args:
        config: finished; vLLM has compared the sizes of the vocabularies.

    Raises:
        ValueError: DEER's is no diffusion model; or its token ids mean other tokens
            than the target's, one of which the message names.
    """
    speculative = config.speculative_config
    _warn_of_cut_drafts(config.scheduler_config, speculative.num_speculative_tokens)
    if config.additional_config[SPECULATION]["method"] == "deer":
        from vllm_dlm.spec_decode.deer.drafting import check_drafter

        hf_config = speculative.draft_model_config.hf_config
        check_drafter(hf_config, speculative.num_speculative_tokens)
    target, draft = config.model_config, speculative.draft_model_config
    if target.skip_tokenizer_init or draft.model == target.model:
        return
    from vllm.tokenizers import cached_tokenizer_from_config
    from vllm.tokenizers.registry import get_tokenizer

    theirs = cached_tokenizer_from_config(target).get_vocab()
    ours = get_tokenizer(
        draft.model,
        revision=draft.revision,
        trust_remote_code=target.trust_remote_code,
    ).get_vocab()
    for token, number in theirs.items():
        if ours.get(token) != number:
            raise ValueError(
                f"the drafter {draft.model!r} does not have the target's vocabulary: "
                f"token {token!r} is {number} for the target and "
                f"{ours.get(token, 'missing')} for the drafter. A drafter must be "
                "trained with the target's tokenizer"
            )


def _warn_of_cut_drafts(scheduler: SchedulerConfig, most: int) -> None:
    rows, budget = scheduler.max_num_seqs * (1 + most), scheduler.max_num_batched_tokens
    if rows > budget:
        logger.warning(
            "%d requests with drafts of %d tokens are %d tokens a step, and "
            "max_num_batched_tokens is %d: at that load drafts are shorter, and what a "
            "seed draws at temperature > 0 depends on other requests. Raise "
            "max_num_batched_tokens, or lower max_num_seqs or num_speculative_tokens.",
            scheduler.max_num_seqs,
            most,
            rows,
            budget,
        )


def check_request(
    params: SamplingParams, speculative_config: SpeculativeConfig | None
) -> None:
    """Refuse what cannot be honoured beside speculation (HTTP 400).

    Raises:
        VLLMValidationError: the request's own draft limit is invalid, or the engine
            does not speculate; or it asks for `logprob_token_ids`, which ends vLLM's
            engine with any speculation.
    """
    from vllm.exceptions import VLLMValidationError

    if speculative_config is not None and params.logprob_token_ids is not None:
        raise VLLMValidationError(
            "logprob_token_ids cannot be combined with speculative decoding: ask for "
            "logprobs, or start the server without --speculative-config"
        )
    extra_args = params.extra_args
    if spec.REQUEST_KEY not in (extra_args or {}):
        return
    if speculative_config is None:
        raise VLLMValidationError(
            f"{spec.REQUEST_KEY}: this engine has no speculative decoding; start it "
            "with --speculative-config, or remove it from the request"
        )
    try:
        spec.request_limit(extra_args, speculative_config.num_speculative_tokens)
    except ValueError as error:
        raise VLLMValidationError(str(error)) from None
