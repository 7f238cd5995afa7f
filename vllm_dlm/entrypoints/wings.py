# SPDX-License-Identifier: Apache-2.0
"""Wings that have a say in an engine's arguments and in requests, by name.

The core imports no wing. Whoever builds an engine or admits a request asks all that
stand in this table; a wing is imported when it is asked for the first time.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    import argparse

    from pydantic import BaseModel
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs


class Wing(Protocol):
    """What a wing's module offers."""

    REQUEST_KEYS: Mapping[str, str]
    """Keys of a request's `extra_args` that the wing reads, for models that are not
    ours -> the server option without which nobody does."""

    OPTIONS: type[BaseModel] | None
    """Options of the wing's own, flags of `vllm serve` and keywords of `LLM` as those
    of `DlmConfig` are; None has none."""

    OPTIONS_KEY: str
    """Where they go in `additional_config`, as they were given."""

    def check_arguments(self, args: argparse.Namespace) -> None:
        """Refuse wrong arguments of a server, before anything starts.

        Args:
            args: `additional_config` holds `OPTIONS` already.

        Raises:
            ValueError: an option of the wing's own is not valid.
        """

    def translate(self, args: EngineArgs) -> bool:
        """Adapt an engine's arguments in place; whether they ask for this wing.

        Raises:
            ValueError: an option is not valid, or does not go with the wing.
        """

    def check(self, config: VllmConfig) -> None:
        """Refuse a finished configuration of an engine that asked for this wing, or add
        what depends on its model runner.

        Raises:
            ValueError: models do not fit together.
        """

    def check_request(self, params: SamplingParams, config: VllmConfig) -> None:
        """Refuse a request that cannot be honoured.

        Args:
            config: of the engine, whose model is not ours.

        Raises:
            VLLMValidationError: it asks for too much, or for what the engine lacks.
        """


_MODULES = (
    "vllm_dlm.spec_decode.front_end",
    "vllm_dlm.steering.front_end",
    "vllm_dlm.switching.front_end",
)


def wings() -> list[Wing]:
    """All wings, each imported once."""
    return [cast("Wing", import_module(name)) for name in _MODULES]


def check_request(params: SamplingParams, config: VllmConfig) -> None:
    """Have all wings refuse what they cannot honour of a request for another model.

    Raises:
        VLLMValidationError: by the first that refuses.
    """
    for wing in wings():
        wing.check_request(params, config)
