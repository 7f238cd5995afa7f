# SPDX-License-Identifier: Apache-2.0
"""From a user's speculative config to what vLLM knows: called before its own check.

A method goes as vLLM's "draft_model", whose KV pages and verification it uses, or as
its "custom_class" (`Options.vllm_method`); the worker class puts our drafter in. All
run synchronously: the length of a draft depends on its tokens. Which model runner
serves them is decided here, and kept (`patches/cpu_runner.py`). The core finds this
module by its name (`entrypoints/wings.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.logger import init_logger
from vllm.triton_utils import HAS_TRITON

from vllm_dlm.config import aliases
from vllm_dlm.config.engine_keys import RUNNER, SPECULATION
from vllm_dlm.spec_decode import options as spec

if TYPE_CHECKING:
    from vllm.config import SchedulerConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams

logger = init_logger(__name__)

WORKER = "vllm_dlm.spec_decode.worker.SpeculativeWorker"

RUNNERS = {
    1: "vllm.v1.worker.gpu_model_runner",
    2: "vllm.v1.worker.gpu.model_runner",
}
"""vLLM's model runners: version -> module."""

REQUEST_KEYS = {spec.REQUEST_KEY: "--speculative-config"}
"""See `entrypoints/wings.py`."""

OPTIONS = None
OPTIONS_KEY = SPECULATION


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
        options = _with_length(options, args)
    _refuse(args, method)
    runner = _runner(method, options)
    args.speculative_config = _vllm_config(args, options, runner)
    args.additional_config = {
        **(args.additional_config or {}),
        SPECULATION: spec.to_plain(method, options),
        RUNNER: runner,
    }
    args.worker_cls = WORKER
    args.async_scheduling = False
    logger.info(
        "Speculative decoding by %s (%s): vLLM's %s path with the worker class %s, "
        "model runner V%d, synchronous scheduling.",
        method,
        options.paper,
        args.speculative_config["method"],
        WORKER.rpartition(".")[2],
        runner,
    )
    return True


def _with_length(options: spec.WithDrafter, args: EngineArgs) -> spec.WithDrafter:
    """The same with the length of drafts that DEER's drafter was trained for.

    Raises:
        ValueError: the drafter is no diffusion model.
    """
    if options.num_speculative_tokens is not None:
        return options
    from vllm.transformers_utils.config import get_config

    from vllm_dlm.spec_decode.deer.drafting import check_drafter, draft_length

    trusts = args.trust_remote_code
    config = get_config(options.model, trusts, revision=options.revision)
    length = draft_length(check_drafter(config, num_masks=1), spec.MAX_DRAFT)
    logger.info("%s was trained to draft %d tokens at once.", options.model, length)
    return options.model_copy(update={"num_speculative_tokens": length})


def _runner(method: str, options: spec.Options) -> int:
    """Which of vLLM's model runners serves the method here, 1 or 2.

    The one that the user asks for (VLLM_USE_V2_MODEL_RUNNER), or that vLLM would pick:
    V2 where Triton works. A method that knows only V1 runs there; and where a vLLM has
    only one of the two, that one is taken.

    Raises:
        ValueError: the user, or this vLLM, has only V2 for a method that knows V1.
    """
    asked = envs.VLLM_USE_V2_MODEL_RUNNER
    there = {version: find_spec(name) is not None for version, name in RUNNERS.items()}
    if options.speculator is None:
        if asked or not there[1]:
            say = "unset VLLM_USE_V2_MODEL_RUNNER" if there[1] else "use 'deer'"
            raise ValueError(
                f"speculative method {method!r} runs on model runner V1: "
                f"{options.why_not_v2}; {say}"
            )
        return 1
    if not all(there.values()):
        return 1 if there[1] else 2
    return 2 if (HAS_TRITON if asked is None else asked) else 1


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
    args: EngineArgs, options: spec.Options, runner: int
) -> dict[str, Any]:
    """The dict that vLLM's `SpeculativeConfig` takes."""
    most = options.num_speculative_tokens
    config: dict[str, Any] = {"num_speculative_tokens": most}
    if runner == 1:
        # "Verification is not of one length": no padding by tokens that nobody
        # drafted, and no CUDA graph of one length. V2 needs no such word: it takes
        # whole graphs for the steps whose drafts are of one length.
        config["num_speculative_tokens_per_batch_size"] = [(1, 1, most)]
    if options.vllm_method == "custom_class":
        path = options.proposer.replace(":", ".")
        return {**config, "method": "custom_class", "model": path}
    config |= {"method": "draft_model", "model": args.model}
    if isinstance(options, spec.WithDrafter):
        shared = set(spec.WithDrafter.model_fields)
        config |= options.model_dump(include=shared, exclude_none=True)
    config.setdefault("draft_tensor_parallel_size", args.tensor_parallel_size)
    # Each token's distribution is attached: more are accepted at temperature > 0.
    if options.attaches_probs:
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
        from vllm_dlm.spec_decode.deer.drafting import check_drafter, untrained_masks

        masks = speculative.num_speculative_tokens
        defaults = check_drafter(speculative.draft_model_config.hf_config, masks)
        if warning := untrained_masks(defaults, masks):
            logger.warning("Speculative method 'deer': %s.", warning)
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


def check_request(params: SamplingParams, config: VllmConfig) -> None:
    """Refuse what cannot be honoured beside speculation (HTTP 400).

    Raises:
        VLLMValidationError: the request's own draft limit is invalid, or the engine
            does not speculate, or by a method of vLLM's own, which reads no such limit;
            or it asks for `logprob_token_ids`, which ends vLLM's engine with any
            speculation.
    """
    from vllm.exceptions import VLLMValidationError

    speculative_config = config.speculative_config
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
    if SPECULATION not in config.additional_config:
        raise VLLMValidationError(
            f"{spec.REQUEST_KEY}: this engine's speculative method, "
            f"{speculative_config.method!r}, is vLLM's own and has no limit for a "
            "request; remove it from the request, or start the server with one of "
            f"{', '.join(spec.METHODS)}"
        )
    try:
        spec.request_limit(extra_args, speculative_config.num_speculative_tokens)
    except ValueError as error:
        raise VLLMValidationError(str(error)) from None
