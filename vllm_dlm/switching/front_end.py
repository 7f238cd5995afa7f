# SPDX-License-Identifier: Apache-2.0
"""What an engine of a pair gets once its model runner is known: its logits processor.

The core finds this module by its name (`entrypoints/wings.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm_dlm.config.engine_keys import SWITCHING
from vllm_dlm.switching.entropy_stop import class_name

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams

OPTIONS = None
OPTIONS_KEY = SWITCHING
REQUEST_KEYS: Mapping[str, str] = {}
"""See `entrypoints/wings.py`: a pair checks its requests itself (`sampling.py`)."""


def check_arguments(args: argparse.Namespace) -> None:
    """Nothing: `vllm serve` has no pairs."""


def translate(args: EngineArgs) -> bool:
    """Whether the engine is one of a pair."""
    own = args.additional_config
    return isinstance(own, Mapping) and SWITCHING in own


def check(config: VllmConfig) -> None:
    """Give the engine the processor that its model runner takes."""
    others = config.model_config.logits_processors or ()
    config.model_config.logits_processors = [*others, class_name(config)]


def check_request(params: SamplingParams, config: VllmConfig) -> None:
    """Nothing: a pair checks its requests itself."""
