# SPDX-License-Identifier: Apache-2.0
"""What the wrapped functions of vLLM's front end do: flags, aliases, answers.

`WRAPPERS` maps entries of the ledger (`patches.py`) to makers; each maker gets the
original function and returns its replacement. Those that refuse requests are in
`admission.py`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from vllm_dlm.admission import body_guard, broken_logits
from vllm_dlm.admission import sampling_params as request
from vllm_dlm.config import aliases
from vllm_dlm.config.cache import POLICIES
from vllm_dlm.entrypoints import step_maps
from vllm_dlm.entrypoints.results import watched
from vllm_dlm.patches import admission
from vllm_dlm.patches.ledger import apply_runner_choice, wrap
from vllm_dlm.spec_decode import front_end as speculation
from vllm_dlm.spec_decode import options as spec

FLAG_PREFIX = "dlm_"

_METAVARS = {
    "strategy": "NAME",
    "strategy_config": "JSON",
    "block_length": "{N,canvas}",
    "cache": f"{{{','.join(POLICIES)}}}",
    "cache_config": "JSON",
    "commit": "{fused,separate}",
    "eotp": "{off,block,token}",
    "tccf": "JSON",
    "filter_dir": "FOLDER",
    "trajectory_dir": "FOLDER",
}


def add_engine_arguments(parser: Any) -> Any:
    """Add the argument group "DlmConfig" to vLLM's parser and return the parser.

    A flag that is not given leaves no attribute behind, so that it overrides nothing.
    """
    from vllm_dlm.config.options import DlmConfig

    group = parser.add_argument_group(
        "DlmConfig",
        "Decoding of diffusion language models (vllm-dlm): the defaults of the server. "
        "A request may override all but the canvas limit and the learned filters, in "
        "`vllm_xargs` (HTTP) or `SamplingParams.extra_args`.",
    )
    for name, field in DlmConfig.model_fields.items():
        flag = f"--{FLAG_PREFIX}{name}".replace("_", "-")
        kind: dict[str, Any] = (
            {"action": argparse.BooleanOptionalAction}
            if field.annotation is bool
            else {"type": _checked(name), "metavar": _METAVARS.get(name, "N")}
        )
        text = (field.description or "").replace("%", "%%")
        group.add_argument(flag, default=argparse.SUPPRESS, help=text, **kind)
    return parser


def _checked(name: str) -> Callable[[str], Any]:
    """An argparse type: one option, validated as in any other source."""

    def parse(text: str) -> Any:
        from vllm_dlm.config.options import parse_options

        try:
            return getattr(parse_options({name: text}, where=name), name)
        except ValueError as error:
            # argparse names the flag.
            message = str(error).removeprefix(f"{name}: {name}: ")
            raise argparse.ArgumentTypeError(message) from None

    return parse


def fold_options(additional_config: Any, options: Mapping[str, Any]) -> Any:
    """`additional_config` with `options` (without prefix) put into its "dlm" part.

    Options win over what is there; a changed strategy or cache policy drops the other's
    parameters.

    Raises:
        ValueError: the merged options are not valid.
    """
    from vllm_dlm.config.options import DlmConfig

    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        return additional_config
    if not isinstance(additional_config, Mapping | None):
        raise ValueError(
            "the dlm options need additional_config to be a dict, not "
            f"{type(additional_config).__name__}"
        )
    before = dict((additional_config or {}).get("dlm") or {})
    if given.get("strategy", before.get("strategy")) != before.get("strategy"):
        before.pop("strategy_config", None)
    if given.get("cache", before.get("cache")) != before.get("cache"):
        before.pop("cache_config", None)
    merged = before | given
    DlmConfig.from_mapping(merged, where="dlm options")
    return {**(additional_config or {}), "dlm": merged}


def _prepare(args: argparse.Namespace) -> argparse.Namespace:
    """A copy of `vllm serve`'s arguments in terms that vLLM itself understands."""
    prepared = argparse.Namespace(**vars(args))
    options = {
        name.removeprefix(FLAG_PREFIX): value
        for name, value in vars(args).items()
        if name.startswith(FLAG_PREFIX)
    }
    prepared.additional_config = fold_options(
        getattr(args, "additional_config", None) or {}, options
    )
    drafting = getattr(args, "speculative_config", None)
    if drafting and spec.is_ours(drafting):
        spec.parse(drafting)
    typed = getattr(args, "model_tag", None) or getattr(args, "model", None)
    if typed in aliases.ALIASES:
        prepared.model = aliases.resolve(
            typed, getattr(args, "revision", None), getattr(args, "hf_token", None)
        )
        if getattr(args, "served_model_name", None) is None:
            # Clients ask for the name that the server was started with.
            prepared.served_model_name = [typed]
    return prepared


def _add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_cli_args(parser: Any) -> Any:
        return add_engine_arguments(original(parser))

    return add_cli_args


def _from_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_cli_args(cls: Any, args: argparse.Namespace) -> Any:
        # An HTTP server builds its application of the same arguments, later.
        middleware = getattr(args, "middleware", None)
        if isinstance(middleware, list) and body_guard.MIDDLEWARE not in middleware:
            args.middleware = [*middleware, body_guard.MIDDLEWARE]
        return original(cls, _prepare(args))

    return from_cli_args


def _validate_serve(original: Callable[..., Any]) -> Callable[..., Any]:
    def validate(self: Any, args: argparse.Namespace) -> None:
        try:
            prepared = _prepare(args)
        except ValueError as error:
            # As argparse ends: one line, no traceback.
            print(f"vllm {self.name}: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        # API server processes get these arguments and load plugins only after they
        # have read them.
        args.additional_config = prepared.additional_config
        original(self, args)

    return validate


def _create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_dlm.config.options import DlmConfig

        typed = self.model
        self.model = aliases.resolve(typed, self.revision, self.hf_token)
        if self.model != typed and self.served_model_name is None:
            self.served_model_name = [typed]
        if self.tokenizer is not None:
            self.tokenizer = aliases.resolve(self.tokenizer, self.tokenizer_revision)
        additional = self.additional_config
        options = additional.get("dlm") if isinstance(additional, Mapping) else None
        if options is not None:
            DlmConfig.from_mapping(options, where='additional_config["dlm"]')
        speculates = speculation.translate(self)
        config = original(self, *args, **kwargs)
        if speculates:
            speculation.check(config)
        ours = request.is_ours(config.model_config.hf_config)
        if options and not ours:
            raise ValueError(
                f"the dlm options ({', '.join(options)}) are for diffusion language "
                f"models that vllm-dlm serves, and {typed!r} is not one; "
                "`vllm-dlm models` lists them"
            )
        body_guard.process["ours"] = ours
        if _SERVER_MODULE in sys.modules:
            # The server imports them next; its requests are checked when they come,
            # for models of vLLM's own too.
            for module in _LATER_MODULES:
                importlib.import_module(module)
            apply_front_end_patches()
        return config

    return create_engine_config


_SERVER_MODULE = "vllm.entrypoints.serve.utils.api_utils"
_LATER_MODULES = (
    "vllm.v1.engine.async_llm",
    *dict.fromkeys(symbol.partition(":")[0] for symbol in admission.HANDLERS),
)


def _get_model_path(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_model_path(model: Any, revision: str | None = None) -> Any:
        if isinstance(model, str):
            model = aliases.resolve(model, revision)
        return original(model, revision)

    return get_model_path


def _raise_if_error(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm.exceptions import GenerationError

    def check(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            original(self, *args, **kwargs)
        except GenerationError as error:
            if not request.is_ours(self.model_config.hf_config):
                raise
            # All else that ends a request in an error is refused at admission.
            raise type(error)(broken_logits.REASON) from None

    return check


def _completion_response(original: Callable[..., Any]) -> Callable[..., Any]:
    def respond(self: Any, results: Any, *args: Any, **kwargs: Any) -> Any:
        response = original(self, results, *args, **kwargs)
        if request.is_ours(self.model_config.hf_config):
            outputs = [output for result in results for output in result.outputs]
            step_maps.add_to_choices(response.choices, outputs)
        return response

    return respond


def _chat_response(original: Callable[..., Any]) -> Callable[..., Any]:
    async def respond(
        self: Any, chat_request: Any, results: Any, *args: Any, **kwargs: Any
    ) -> Any:
        seen: deque[Any] = deque(maxlen=1)
        passing = watched(results, seen.append)
        response = await original(self, chat_request, passing, *args, **kwargs)
        # Not an error's answer, which has none.
        choices = getattr(response, "choices", None)
        if choices and request.is_ours(self.model_config.hf_config):
            step_maps.add_to_choices(choices, seen[0].outputs)
        return response

    return respond


def _run_busy_loop(original: Callable[[Any], None]) -> Callable[[Any], None]:
    from vllm.v1.engine.core import EngineCoreActorMixin

    def run(self: Any) -> None:
        try:
            original(self)
        except Exception:
            if isinstance(self, EngineCoreActorMixin):
                self._send_engine_dead()
            raise

    return run


WRAPPERS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "vllm.engine.arg_utils:EngineArgs.add_cli_args": _add_cli_args,
    "vllm.engine.arg_utils:EngineArgs.from_cli_args": _from_cli_args,
    "vllm.engine.arg_utils:EngineArgs.create_engine_config": _create_engine_config,
    "vllm.engine.arg_utils:get_model_path": _get_model_path,
    **admission.WRAPPERS,
}

SERVER_WRAPPERS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "vllm.entrypoints.cli.serve:ServeSubcommand.validate": _validate_serve,
    "vllm.entrypoints.generate.base.serving:GenerateBaseServing._raise_if_error": (
        _raise_if_error
    ),
    "vllm.v1.engine.core:EngineCoreProc.run_busy_loop": _run_busy_loop,
    "vllm.v1.engine.core:DPEngineCoreProc.run_busy_loop": _run_busy_loop,
    **admission.SERVER_WRAPPERS,
    "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion"
    ".request_output_to_completion_response": _completion_response,
    "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat"
    ".chat_completion_full_generator": _chat_response,
}
"""Only where the HTTP server's module is loaded: importing it costs seconds."""


def apply_front_end_patches() -> None:
    """Flags, model aliases and the admission of requests.

    What only the HTTP server needs is applied where its modules are loaded already,
    as they are when `vllm serve` loads plugins.
    """
    apply_runner_choice()
    for symbol, make in WRAPPERS.items():
        wrap(symbol, make)
    for symbol, make in SERVER_WRAPPERS.items():
        if symbol.partition(":")[0] in sys.modules:
            wrap(symbol, make)
