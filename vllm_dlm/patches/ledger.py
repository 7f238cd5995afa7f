# SPDX-License-Identifier: Apache-2.0
"""The ledger: every vLLM symbol this package wraps, and why.

`PATCHES` is the data: one entry per symbol. The `apply_*` functions, below and in
`front_end.py`, install the entries, each at most once per process; those below import
vLLM only when called.

Not wrapped, but given a subclass of ours by `DiffusionStepScheduler`, because vLLM
builds them and offers no hook: each `vllm.v1.request:Request` (how a waiting request
counts its tokens) and its `vllm.v1.core.kv_cache_manager:KVCacheManager` (which pages
may be shared). Set on objects of an engine's own, by `replace`: `canvas_request.py`
sets `cache_blocks` of the managers of pages in there; `spec_decode/worker.py` sets the
model runner's `drafter`, `effective_drafter_max_model_len` and
`_get_spec_decode_draft_probs`, and the config's `disable_padded_drafter_batch`;
`drafter.py` its own `_last_draft_probs`, which the runner reads; `del_proposer.py` the
runner's `use_aux_hidden_state_outputs`. And in a pair's server `switching/responses.py`
wraps handlers, `switching/routes.py` takes routes off.
"""

import functools
import inspect
import pkgutil
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_dlm.config.engine_keys import NEED_RUNNER_V1
from vllm_dlm.vllm_objects import missing, replace

_MARK = "_vllm_dlm_patches"


@dataclass(frozen=True)
class Patch:
    """One wrapped vLLM symbol."""

    symbol: str
    """`module:Class.attribute` or `module:attribute`."""
    why: str
    how: str
    upstream: str
    """The upstream issue or seam that would make this unnecessary."""
    drop_when: str


_WHEN_VERIFICATION_IS_RIGHT = (
    "tests/spec_decode/test_verification_cpu.py passes without it"
)

PATCHES: dict[str, Patch] = {
    patch.symbol: patch
    for patch in (
        Patch(
            symbol="vllm.config.vllm:VllmConfig.use_v2_model_runner",
            why=(
                "Diffusion models run only on model runner V2, which vLLM does not "
                "pick where Triton is missing, as on the CPU wheel. Our speculative "
                "methods and entropy switching run only on V1, which vLLM picks "
                "nowhere else."
            ),
            how=(
                "True for diffusion models on a CPU whose kernels we replace, False "
                "for engines with such a method; every other engine, and an explicit "
                "VLLM_USE_V2_MODEL_RUNNER, is untouched."
            ),
            upstream=(
                "no issue yet: a platform cannot say that it replaces kernels; V2 has "
                "no seam for drafters"
            ),
            drop_when=(
                "vLLM asks the platform instead of HAS_TRITON, and V2 takes drafters"
            ),
        ),
        Patch(
            symbol="vllm.config.vllm:VllmConfig._validate_v2_model_runner",
            why="The same gate, where the finished config is validated.",
            how="Keeps the check for unsupported features, skips the one for Triton.",
            upstream="no issue yet: a platform cannot say that it replaces kernels",
            drop_when="vLLM asks the platform instead of HAS_TRITON",
        ),
        Patch(
            symbol="vllm.v1.worker.gpu_worker:Worker.__init__",
            why="The same gate again, in a worker, since vLLM 0.33.",
            how=(
                "For diffusion models on a CPU the module takes Triton to be there "
                "while the worker is made; it looks at nothing but this check."
            ),
            upstream="no issue yet: a platform cannot say that it replaces kernels",
            drop_when="vLLM asks the platform instead of HAS_TRITON",
        ),
        Patch(
            symbol="vllm.v1.kv_cache_interface:KVCacheConfig.needs_kv_cache_zeroing",
            why=(
                "Attention on a CPU reads a page to its end: NaNs that one request "
                "has left there are the next one's."
            ),
            how="True in processes that serve one of our models on a CPU.",
            upstream="no issue yet: vLLM empties pages for mixed kinds of caches only",
            drop_when="the CPU's attention kernel does not read behind the keys",
        ),
        Patch(
            symbol="vllm.triton_utils:triton.next_power_of_2",
            why=(
                "Runner V2 sizes its launches with triton.next_power_of_2 on the "
                "host; vLLM's stand-in for a missing Triton lacks it."
            ),
            how="Adds vLLM's own next_power_of_2 to the stand-in.",
            upstream="no issue yet: TritonPlaceholder has cdiv only",
            drop_when="TritonPlaceholder has next_power_of_2",
        ),
        Patch(
            symbol="vllm.triton_utils.dispatcher:_rebind_kernels",
            why=(
                "Overriding a kernel scans every loaded module and dies on llvmlite's "
                "library handle, which answers any attribute, so on any CPU worker "
                "that starts after numba was imported."
            ),
            how="Hides llvmlite, which holds no kernels, from the scan.",
            upstream="no issue yet: `vars(value).get` assumes a dict",
            drop_when="the scan checks that `__dict__` is a dict",
        ),
        Patch(
            symbol="vllm.utils.cpu_triton_utils:_expand_kernel_impl",
            why=(
                "It writes into a copy, so that drafts get uninitialised memory for "
                "their temperature, top-k and top-p: speculative decoding at "
                "temperature > 0 draws from wrong distributions on a CPU."
            ),
            how="Replaced by `kernels/verification_cpu.py`, for every model.",
            upstream="no issue yet: `_ensure_int64(output)` is never copied back",
            drop_when=_WHEN_VERIFICATION_IS_RIGHT,
        ),
        Patch(
            symbol="vllm.utils.cpu_triton_utils:_rejection_random_sample_kernel_impl",
            why=(
                "It reads the probability of token -1, which stands for no draft, and "
                "may accept it."
            ),
            how="Such a draft is never accepted.",
            upstream="no issue yet: the Triton kernel rejects negative drafts",
            drop_when=_WHEN_VERIFICATION_IS_RIGHT,
        ),
        Patch(
            symbol="vllm.v1.sample.rejection_sampler:apply_sampling_constraints",
            why=(
                "With top-k, and without top-p, a step without drafts ends a CPU's "
                "engine: the maximum of an empty tensor."
            ),
            how="Does nothing where there is no draft.",
            upstream="no issue yet: apply_top_k_only of no rows",
            drop_when=_WHEN_VERIFICATION_IS_RIGHT,
        ),
        Patch(
            symbol="vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample",
            why=(
                "A seeded request whose prompt is computed in chunks ends a CPU's "
                "engine: what its thrown-away sample drew is taken back by an offset, "
                "which a CPU's generator does not have."
            ),
            how="Keeps the states of such requests' generators.",
            upstream="no issue yet: CPU generators have no offset",
            drop_when=_WHEN_VERIFICATION_IS_RIGHT,
        ),
        Patch(
            symbol="vllm.v1.worker.gpu_model_runner:GPUModelRunner._bookkeeping_sync",
            why="The same, where the draw is taken back.",
            how="Puts these states back instead.",
            upstream="no issue yet: CPU generators have no offset",
            drop_when=_WHEN_VERIFICATION_IS_RIGHT,
        ),
        Patch(
            symbol="vllm.engine.arg_utils:EngineArgs.add_cli_args",
            why="A plugin has no seam for flags of its own.",
            how="Adds the argument group DlmConfig to the parser.",
            upstream="no issue yet: plugins cannot register arguments",
            drop_when="general plugins may add engine arguments",
        ),
        Patch(
            symbol="vllm.engine.arg_utils:EngineArgs.from_cli_args",
            why="vLLM drops arguments that are not fields of EngineArgs.",
            how=(
                'Folds --dlm-* into additional_config["dlm"] and resolves model '
                "aliases; clients keep asking for the name that was typed. Puts our "
                "BodyGuard into --middleware."
            ),
            upstream="no issue yet: plugins cannot register arguments",
            drop_when="general plugins may add engine arguments",
        ),
        Patch(
            symbol="vllm.engine.arg_utils:EngineArgs.create_engine_config",
            why=(
                "Offline use builds EngineArgs before plugins are loaded: this is the "
                "first method after it."
            ),
            how=(
                "Resolves the model alias, validates the dlm options, and refuses them "
                "for models that are not ours."
            ),
            upstream="no issue yet: no hook between arguments and model config",
            drop_when="vLLM has a hook for model names or engine arguments",
        ),
        Patch(
            symbol="vllm.engine.arg_utils:get_model_path",
            why="With HF_HUB_OFFLINE, EngineArgs looks its model up when it is built.",
            how="Resolves the model alias first.",
            upstream="no issue yet: no hook for model names",
            drop_when="vLLM has a hook for model names",
        ),
        Patch(
            symbol="vllm.entrypoints.cli.serve:ServeSubcommand.validate",
            why="A wrong option would end `vllm serve` in a traceback, minutes later.",
            how="Checks the dlm options and the model alias before anything starts.",
            upstream="no issue yet: plugins cannot validate arguments",
            drop_when="general plugins may add engine arguments",
        ),
        Patch(
            symbol="vllm.sampling_params:SamplingParams._validate_diffusion",
            why="It refuses temperature, seed and others for every diffusion model.",
            how=(
                "Our models get `request.validate_sampling_params`; others keep it and "
                "refuse our options, which vLLM would ignore."
            ),
            upstream="no issue yet: the check does not ask the model",
            drop_when="a model can say which sampling parameters it honours",
        ),
        Patch(
            symbol="vllm.sampling_params:SamplingParams._validate_spec_decode",
            why="A request's own draft limit would be read by the worker only.",
            how="Refuses one that is no number, too large, or without speculation.",
            upstream="no issue yet: speculation has no parameters per request",
            drop_when="vLLM has a parameter for it",
        ),
        *(
            Patch(
                symbol=f"vllm.entrypoints.{handler}",
                why=(
                    "vLLM drops fields of a body that it does not know, renames those "
                    "that it does, and repeats what was sent at any length."
                ),
                how=(
                    "Refuses fields that are meant as our options; remembers what the "
                    "client calls a sampling parameter; cuts refusals short."
                ),
                upstream="no issue yet: extra fields are allowed on purpose",
                drop_when="vLLM refuses unknown fields and names those that were sent",
            )
            for handler in (
                "openai.completion.serving:OpenAIServingCompletion.create_completion",
                "openai.chat_completion.serving:OpenAIServingChat.create_chat_completion",
                (
                    "openai.chat_completion.batch_serving:OpenAIServingChatBatch"
                    ".create_batch_chat_completion"
                ),
                "openai.responses.serving:OpenAIServingResponses.create_responses",
                "anthropic.serving:AnthropicServingMessages.create_messages",
                "scale_out.token_in_token_out.serving:ServingTokens.serve_tokens",
                "scale_out.render.serving:ServingRender.render_completion_request",
                "scale_out.render.serving:ServingRender.render_chat_request",
                "scale_out.render.serving:ServingRender.render_responses_request",
                "scale_out.render.serving:ServingRender.render_messages_request",
            )
        ),
        Patch(
            symbol="vllm.config.vllm:VllmConfig._check_supports_watermarking",
            why="Beam search reaches the engine as one-token requests.",
            how="Called first by both ways of beam search; refuses it for our models.",
            upstream="no issue yet: beam search does not ask the model",
            drop_when="vLLM refuses beam search for diffusion models",
        ),
        Patch(
            symbol="vllm.renderers.base:BaseRenderer.validate_token_ids",
            why=(
                "Prompts may have any id that the tokenizer knows, and without one any "
                "at all; the model may have no embedding for it, which ends the engine."
            ),
            how="Refuses such ids for our models.",
            upstream="no issue yet: placeholders of other media lie out there",
            drop_when="vLLM checks prompts of text against the model's vocabulary",
        ),
        Patch(
            symbol="vllm.entrypoints.serve.utils.api_utils:get_max_tokens",
            why="The HTTP server cuts max_tokens to what fits and does not say so.",
            how="Refuses an explicit max_tokens that does not fit, for our models.",
            upstream="no issue yet: clamping is on purpose",
            drop_when="vLLM can refuse instead of clamping",
        ),
        Patch(
            symbol="vllm.v1.engine.async_llm:AsyncLLM.generate",
            why=(
                "It checks a request when its first token is asked for: a streamed "
                "reply has begun by then, with status 200."
            ),
            how=(
                "Checks requests for our models, and our options of others, when it is "
                "called."
            ),
            upstream="no issue yet: an async generator runs nothing when called",
            drop_when="vLLM verifies sampling parameters before it streams",
        ),
        Patch(
            symbol=(
                "vllm.entrypoints.generate.base.serving:GenerateBaseServing"
                "._raise_if_error"
            ),
            why="It says `Internal server error`, whatever ended a request.",
            how="Says of our models that the logits were no numbers.",
            upstream="no issue yet: an output's stop_reason is not looked at",
            drop_when="the error of an output with finish_reason error names a reason",
        ),
        Patch(
            symbol=(
                "vllm.entrypoints.openai.responses.serving:OpenAIServingResponses"
                "._generate_with_builtin_tools"
            ),
            why=(
                "/v1/responses asks the engine when a streamed reply has begun: what "
                "that refuses ends the connection without a word."
            ),
            how=(
                "Checks requests for our models, and our options of others, when it is "
                "called."
            ),
            upstream="no issue yet: an async generator runs nothing when called",
            drop_when="vLLM verifies sampling parameters before it streams",
        ),
        Patch(
            symbol="vllm.v1.engine.core:EngineCoreProc.run_busy_loop",
            why=(
                "Data parallel over Ray: clients of an engine that failed wait for "
                "ever, and /health says 200."
            ),
            how="The engine tells its clients, as one in a process of its own does.",
            upstream=(
                "no issue yet: the monitor expects RayActorError, gets RayTaskError"
            ),
            drop_when="a failed engine in a Ray actor reports itself",
        ),
        Patch(
            symbol="vllm.v1.engine.core:DPEngineCoreProc.run_busy_loop",
            why="The same, for mixtures of experts.",
            how="The same.",
            upstream=(
                "no issue yet: the monitor expects RayActorError, gets RayTaskError"
            ),
            drop_when="a failed engine in a Ray actor reports itself",
        ),
        Patch(
            symbol=(
                "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion"
                ".request_output_to_completion_response"
            ),
            why="An answer has no place for what a model says of each token.",
            how="Adds `step_map` to the choices of requests that asked for it.",
            upstream="no issue yet: choices are built of vLLM's own fields",
            drop_when="an output can carry fields of a plugin into its choice",
        ),
        Patch(
            symbol=(
                "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat"
                ".chat_completion_full_generator"
            ),
            why="The same, for chats.",
            how="The same; keeps the last output it is given, to read the maps off.",
            upstream="no issue yet: choices are built of vLLM's own fields",
            drop_when="an output can carry fields of a plugin into its choice",
        ),
    )
}

_applied: list[Patch] = []


def applied() -> list[Patch]:
    """The entries in force in this process, in the order they were applied."""
    return list(_applied)


def wrap(symbol: str, make: Callable[[Any], Callable[..., Any]]) -> None:
    """Replace `symbol` of the ledger by `make(original)`, once per process.

    Functions, methods, class and static methods and properties keep their kind.

    Args:
        symbol: a key of `PATCHES`.
        make: gets the plain function behind the symbol and returns its replacement,
            which takes the same arguments.

    Raises:
        ValueError: no such entry in the ledger.
        RuntimeError: this vLLM has no such symbol.
    """
    patch = _entry(symbol)
    owner, attribute, raw = find(symbol)
    original = raw
    if isinstance(raw, property):
        original = raw.fget
    elif isinstance(raw, (classmethod, staticmethod)):
        original = raw.__func__
    marks: frozenset[str] = getattr(original, _MARK, frozenset())
    if symbol in marks:
        return
    replacement: Any = functools.wraps(original)(make(original))
    setattr(replacement, _MARK, marks | {symbol})
    if isinstance(raw, property):
        replacement = raw.getter(replacement)
    elif isinstance(raw, (classmethod, staticmethod)):
        replacement = type(raw)(replacement)
    setattr(owner, attribute, replacement)
    _applied.append(patch)


def add(symbol: str, value: Any) -> None:
    """Set `symbol` of the ledger to `value` where vLLM has nothing by that name."""
    patch = _entry(symbol)
    owner, attribute = _owner(symbol)
    if not hasattr(owner, attribute):
        setattr(owner, attribute, value)
        _applied.append(patch)


def find(symbol: str) -> tuple[Any, str, Any]:
    """The owner of a symbol of the ledger, its name there, and what it is there.

    Raises:
        RuntimeError: this vLLM has no such symbol.
    """
    owner, attribute = _owner(symbol)
    raw = inspect.getattr_static(owner, attribute, None)
    if raw is None:
        raise RuntimeError(missing(symbol))
    return owner, attribute, raw


def apply_runner_choice() -> None:
    """Model runner V2 for diffusion models on a CPU, V1 for what needs that.

    Call it once `vllm.config` is fully imported.
    """
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    def use_v2_model_runner(original: Callable[[Any], bool]) -> Callable[[Any], bool]:
        def decide(self: Any) -> bool:
            if envs.VLLM_USE_V2_MODEL_RUNNER is None:
                if not HAS_TRITON and _is_diffusion(self):
                    return True
                own = self.additional_config
                if isinstance(own, dict) and NEED_RUNNER_V1 & own.keys():
                    return False
            return original(self)

        return decide

    wrap("vllm.config.vllm:VllmConfig.use_v2_model_runner", use_v2_model_runner)


def apply_cpu_runner_patches() -> None:
    """Let diffusion models use model runner V2 on a CPU build without Triton.

    Call it once `vllm.config` is fully imported. Where Triton works there is little
    to do.
    """
    from vllm.triton_utils import HAS_TRITON

    apply_runner_choice()

    from vllm_dlm.model_executor.clean_pages import needs_kv_cache_zeroing

    wrap(
        "vllm.v1.kv_cache_interface:KVCacheConfig.needs_kv_cache_zeroing",
        needs_kv_cache_zeroing,
    )
    if HAS_TRITON:
        return

    from vllm.triton_utils import dispatcher
    from vllm.utils.math_utils import next_power_of_2

    def validate(original: Callable[[Any], None]) -> Callable[[Any], None]:
        def check(self: Any) -> None:
            if not _is_diffusion(self):
                return original(self)
            unsupported = self._get_v2_model_runner_unsupported_features()
            if unsupported:
                raise ValueError(
                    "Model Runner V2, which diffusion models need, does not yet "
                    f"support: {', '.join(unsupported)}"
                )
            return None

        return check

    def rebind_kernels(original: Callable[[Any], None]) -> Callable[[Any], None]:
        def rebind(overrides: Any) -> None:
            seen = {
                name: module
                for name, module in sys.modules.items()
                if name.partition(".")[0] != "llvmlite"
            }
            dispatcher.sys = types.SimpleNamespace(modules=seen)
            try:
                original(overrides)
            finally:
                dispatcher.sys = sys

        return rebind

    wrap("vllm.config.vllm:VllmConfig._validate_v2_model_runner", validate)
    wrap("vllm.triton_utils.dispatcher:_rebind_kernels", rebind_kernels)
    add("vllm.triton_utils:triton.next_power_of_2", next_power_of_2)


def apply_cpu_worker_patches() -> None:
    """Let workers of diffusion models be made on a CPU build without Triton.

    Call it in a worker, before its class is resolved. vLLM 0.32 has no such check.
    """
    from vllm.triton_utils import HAS_TRITON
    from vllm.v1.worker import gpu_worker

    if HAS_TRITON or not hasattr(gpu_worker, "HAS_TRITON"):
        return

    def init(original: Callable[..., None]) -> Callable[..., None]:
        def make(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            replace(gpu_worker, "HAS_TRITON", _is_diffusion(vllm_config))
            try:
                original(self, vllm_config, *args, **kwargs)
            finally:
                replace(gpu_worker, "HAS_TRITON", HAS_TRITON)

        return make

    wrap("vllm.v1.worker.gpu_worker:Worker.__init__", init)


def apply_cpu_verification_patches() -> None:
    """Right verification of drafts on a CPU; call it in a worker, before its model.

    What this vLLM lacks is left out, with a warning: most engines verify nothing, and
    those that do are refused by `require_cpu_verification`.
    """
    from vllm.logger import init_logger
    from vllm.triton_utils import HAS_TRITON

    from vllm_dlm.patches.cpu_verification import WRAPPERS

    if not HAS_TRITON:
        for symbol, make in WRAPPERS.items():
            try:
                wrap(symbol, make)
            except RuntimeError as error:
                init_logger(__name__).warning("%s", error)


def require_cpu_verification() -> None:
    """Refuse to speculate on a CPU whose verification could not be mended.

    Raises:
        RuntimeError: this vLLM lacks a symbol of `kernels/verification_cpu.py`.
    """
    from vllm.triton_utils import HAS_TRITON

    from vllm_dlm.patches.cpu_verification import WRAPPERS

    if not HAS_TRITON:
        for symbol in WRAPPERS:
            find(symbol)


def _is_diffusion(vllm_config: Any) -> bool:
    model_config = vllm_config.model_config
    return model_config is not None and model_config.is_diffusion


def _entry(symbol: str) -> Patch:
    if symbol not in PATCHES:
        raise ValueError(
            f"{symbol!r} is not in the patch ledger; it has: {', '.join(PATCHES)}"
        )
    return PATCHES[symbol]


def _owner(symbol: str) -> tuple[Any, str]:
    module, _, path = symbol.partition(":")
    parent, _, attribute = path.rpartition(".")
    try:
        return pkgutil.resolve_name(f"{module}:{parent}"), attribute
    except (ImportError, AttributeError) as error:
        raise RuntimeError(missing(symbol)) from error
