# SPDX-License-Identifier: Apache-2.0
"""What generation_config.json says of our models, and what they take of it.

A request that sets nothing is decoded by it. Checkpoints inherit much of theirs from
the autoregressive model that they were made from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_dlm.config.model import ModelDefaults, as_ids, declared_stop_ids
from vllm_dlm.model_executor.models.config_fields import check_kind

if TYPE_CHECKING:
    from vllm.config import ModelConfig

logger = init_logger(__name__)

NO_PENALTIES = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


def read_generation_config(model_config: ModelConfig) -> None:
    """Take parameters of the model's strategy from generation_config.json.

    Raises:
        ValueError: one of them is not there.
    """
    hf_config = model_config.hf_config
    fields = getattr(hf_config, "dlm_generation_fields", None) or {}
    given = model_config.try_get_generation_config() if fields else {}
    found = {}
    for name, path in fields.items():
        value: Any = given
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None:
            raise ValueError(
                f"generation_config.json of this model has no {path}, by which it is "
                "decoded: add it, or give a folder that has it with --generation-config"
            )
        found[name] = value
    if found:
        hf_config.dlm_strategy_config = {**found, **hf_config.dlm_strategy_config}
        # Else no answer would be longer than the checkpoint's own default.
        model_config.override_generation_config.setdefault("max_new_tokens", None)


def set_usual_sampling(model_config: ModelConfig) -> None:
    """Choose how a request is drawn that says nothing of it.

    Raises:
        ValueError: the user asked for a penalty.
    """
    # The references decode greedily unless told otherwise, and confidence rules are
    # tuned for that; `--override-generation-config` says otherwise. (Random tokens
    # need draws: without any, all entropies are 0.)
    defaults = ModelDefaults.from_hf_config(model_config.hf_config)
    usual = 0.0 if defaults.noise == "mask" else 1.0
    model_config.override_generation_config.setdefault("temperature", usual)
    _drop_penalties(model_config)


def _drop_penalties(model_config: ModelConfig) -> None:
    """Do without the penalties that a checkpoint inherits with generation_config.json.

    They are of the autoregressive model that it was made from, and each request that
    set none would be refused for them.

    Raises:
        ValueError: the user asked for one.
    """
    inherited = model_config.try_get_generation_config()
    override = model_config.override_generation_config
    for name, unset in NO_PENALTIES.items():
        if override.get(name) not in (None, unset):
            raise ValueError(
                f"{name} is not supported for diffusion language models; remove it "
                "from --override-generation-config"
            )
        if inherited.get(name) not in (None, unset):
            logger.info(
                "Leaving out %s %s of generation_config.json: a canvas has no order "
                "in which tokens could be counted.",
                name,
                inherited[name],
            )
            override[name] = unset


def check_stop_ids(model_config: ModelConfig) -> None:
    """Some token must end a text, or each request writes all of its `max_tokens`.

    Ids outside the vocabulary cannot be written: they are left out, with a warning.

    Raises:
        ValueError: config.json, generation_config.json and the family name none, or
            what generation_config.json names is no id.
    """
    hf_config = model_config.hf_config
    eos = model_config.try_get_generation_config().get("eos_token_id")
    check_kind("eos_token_id", eos, "generation_config.json")
    ids = {*declared_stop_ids(hf_config), *as_ids(eos)}
    size = hf_config.vocab_size
    outside = sorted(i for i in ids if not 0 <= i < size)
    if outside:
        logger.warning(
            "Leaving out the ids %s, which should end a text and are outside the "
            "vocabulary of %d: dlm_stop_ids and eos_token_id in config.json, and "
            "eos_token_id in generation_config.json, set them.",
            ", ".join(map(str, outside)),
            size,
        )
    if len(outside) == len(ids):
        raise ValueError(
            "no token ends a text of this model: neither config.json nor "
            "generation_config.json has an eos_token_id of its vocabulary of "
            f"{size}; set it there, or with "
            "--hf-overrides '{\"eos_token_id\": ID}'"
        )
