# SPDX-License-Identifier: Apache-2.0
"""What a user says of steering, and the file of a calibrated constant. No vLLM here.

`SteerConfig` is what was given: flags of `vllm serve`, keywords of `LLM`. `Steering` is
what an engine's processes get of it, in `additional_config`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from vllm_dlm.files.whole_files import MIB, read_json
from vllm_dlm.messages import explain, quote, unknown
from vllm_dlm.option_types import Count, Number

KEEP = 0.1
"""The paper's, where nothing else is said."""

CALIBRATE = "vllm-dlm train steer-mu --tuned TUNED --base BASE"
"""What makes a constant."""


def _read_mu(value: Any) -> Any:
    """A number, or else the name of a file."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Path):
        raise ValueError("expected a number or the name of a file")
    try:
        number = float(str(value))
    except ValueError:
        if not str(value).strip():
            raise ValueError("expected a number or the name of a file") from None
        return str(value)
    if not math.isfinite(number):
        raise ValueError("expected a finite number")
    return number


class SteerConfig(BaseModel):
    """Steering by a base model (SVDecode, arXiv 2509.15888), for autoregressive models
    that were tuned from it; docs/steering.md."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steer_base: str | None = Field(
        None,
        min_length=1,
        json_schema_extra={"metavar": "MODEL"},
        description="Autoregressive models: the model that the served one was tuned "
        "from, folder, hub id or alias; both compute every token.",
    )
    steer_mu: Annotated[float | str, BeforeValidator(_read_mu)] | None = Field(
        None,
        json_schema_extra={"metavar": "N|FILE"},
        description="How far logits move towards the base; negative is away from it. "
        "A number, or the file of a calibration (`vllm-dlm train steer-mu`).",
    )
    steer_keep: Number | None = Field(
        None,
        ge=0,
        le=1,
        description="Tokens below this share of the tuned model's best probability are "
        f"not written; 0 keeps all. Default: as calibrated, else {KEEP}.",
    )


class Constant(BaseModel):
    """The file of a calibration."""

    model_config = ConfigDict(extra="ignore")

    mu: Number = Field(allow_inf_nan=False)
    keep: Number = Field(ge=0, le=1)
    tuned: str
    """The models, as they were called."""
    base: str
    fit: str
    """How `mu` was found; `training/steer_mu.py` says what there is."""
    tokens: Count = Field(ge=1)
    """Answer tokens that were read."""
    kept: Count = Field(ge=1)
    """Those that `keep` kept, which `mu` is made of."""


def read_constant(file: str | Path) -> Constant:
    """What a calibration found.

    Raises:
        ValueError: it is no such file.
    """
    return read_json(file, "steering constant", Constant, MIB)


class Steering(BaseModel):
    """What the engine's processes are told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str
    """Folder or hub id."""
    mu: float
    keep: float
    architectures: list[str]
    """The tuned model's own; the engine's is `DlmSteeredForCausalLM`."""
    quantization: str | None
    """As it was asked for, for both models."""


def parse(given: Any) -> SteerConfig:
    """Options by their names without `dlm_`.

    Raises:
        ValueError: an option is unknown, not valid, or missing.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"expected options of steering, got {quote(given)}")
    for name in given:
        if name not in SteerConfig.model_fields:
            raise ValueError(unknown(name, SteerConfig.model_fields))
    try:
        config = SteerConfig(**given)
    except ValidationError as error:
        raise ValueError(explain(error)) from None
    if config.steer_base is None:
        others = ", ".join(f"dlm_{name}" for name, _ in _given(config))
        if others:
            raise ValueError(
                f"{others} without dlm_steer_base: name the model that the served one "
                "was tuned from"
            )
    elif config.steer_mu is None:
        raise ValueError(
            f"dlm_steer_base {quote(config.steer_base)} needs dlm_steer_mu: a number, "
            f"or the file that `{CALIBRATE} --output FILE.json` writes"
        )
    return config


def _given(config: SteerConfig) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in config if value is not None]


def resolve(config: SteerConfig) -> tuple[float, float]:
    """The constant and the share of the best probability, files read.

    Raises:
        ValueError: the file cannot be read.
    """
    if isinstance(config.steer_mu, str):
        constant = read_constant(config.steer_mu)
        mu, keep = constant.mu, constant.keep
    else:
        mu, keep = float(config.steer_mu or 0), KEEP
    return mu, keep if config.steer_keep is None else config.steer_keep
