# SPDX-License-Identifier: Apache-2.0
"""`vllm-dlm models`: the models with a short name, and how one is decoded."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from vllm_dlm.config.aliases import Alias


def show(model: str | None, memory: bool = False, length: int | None = None) -> None:
    """List the models with a short name, or show one model.

    Args:
        model: a folder, a short name, or None for the list.
        memory: show what it needs of a GPU.
        length: of a request, in positions.

    Raises:
        ValueError: `model` is none, or is not on this machine; or the other arguments
            do not go together.
    """
    if length is not None and not memory:
        raise ValueError("--length is for --memory")
    if model is None:
        if memory:
            raise ValueError("--memory is of one model: name a folder or a short name")
        _list()
    elif memory:
        _show_memory(model, length or 4096)
    else:
        _show_model(model)


def _list() -> None:
    from itertools import groupby

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from vllm_dlm.config import aliases
    from vllm_dlm.model_executor.models.tables import ARCHITECTURES

    # Names are for copying: rather let the terminal break a line than cut one.
    console = Console(highlight=False, width=160)
    present = []
    by_family = groupby(aliases.ALIASES.items(), lambda item: item[1].family)
    for family, members in by_family:
        table = Table(box=None, pad_edge=False, show_header=False)
        for name, alias in members:
            folder = aliases.local_folder(name)
            if folder is not None:
                present.append(f"{name} in {folder}")
            cells = (
                f"  {name}",
                *_describe_model(alias, folder),
                "built in" if alias.built_in else alias.target,
                alias.summary,
            )
            table.add_row(*map(Text, cells))
        console.print(Text(f"{family.name} ({family.architecture})"))
        console.print(table)
    console.print(
        Text(
            "\nFull attention sees everything, block attention all blocks up to its "
            "own, causal attention what is finished causally.\nStrategy and block are "
            "the model's defaults. Any other "
            "checkpoint of these architectures is served by its folder or hub id: "
            f"{', '.join(ARCHITECTURES)}.\n"
            f"On this machine: {'; '.join(present) or 'none of them'}."
        )
    )


def _describe_model(alias: Alias, folder: str | None) -> tuple[str, str, str]:
    """Attention, block and strategy of a model, as the table shows them."""
    from vllm_dlm.model_executor.models.tables import HF_CONFIGS
    from vllm_dlm.registry import load

    family = alias.family
    if not family.is_diffusion:
        return "autoregressive", "", ""
    config_class = load(HF_CONFIGS[family.model_type])
    if folder is not None:
        try:
            config = config_class.from_pretrained(folder, name_or_path=folder)
        except (OSError, ValueError, TypeError):
            return "its config.json cannot be read", "", ""
    else:
        known = {"architectures": [family.architecture]}
        config = config_class.from_dict(known, name_or_path=alias.target)
    try:
        return _describe_config(config)
    except ValueError as error:
        return str(error), "", ""


def _describe_config(config: PretrainedConfig) -> tuple[str, str, str]:
    """The same of a configuration; its folder's options count.

    Raises:
        ValueError: they are wrong.
    """
    from vllm_dlm.config.levels import folder_options
    from vllm_dlm.config.model import ModelDefaults

    defaults, options = ModelDefaults.from_hf_config(config), folder_options(config)
    shift = ", shifted" if defaults.shift else ""
    return (
        f"{defaults.attention} attention{shift}",
        f"block {options.block_length or defaults.block_length}",
        options.strategy or defaults.strategy,
    )


def _show_model(model: str) -> None:
    """How a model is decoded by default.

    Raises:
        ValueError: it is not on this machine, is no diffusion model, or its folder's
            options are wrong.
    """
    import json

    from vllm_dlm.files.model_folders import Config
    from vllm_dlm.messages import unknown
    from vllm_dlm.model_executor.models.tables import HF_CONFIGS
    from vllm_dlm.registry import load

    folder = _folder_of(model)
    if folder is None:
        raise ValueError(f"{model!r} is not on this machine: name a folder")
    kind = str(Config(folder).values.get("model_type"))
    if kind not in HF_CONFIGS:
        raise ValueError(
            f"{folder}: model_type in config.json: {unknown(kind, HF_CONFIGS)}"
        )
    config = load(HF_CONFIGS[kind]).from_pretrained(folder, name_or_path=folder)
    attention, block, strategy = _describe_config(config)
    print(f"{model}: {attention}, {block}, strategy {strategy}")
    if options := getattr(config, "dlm_options", None):
        print(f"dlm_options in its config.json: {json.dumps(options)}")


def _folder_of(model: str) -> str | None:
    """The folder of a model on this machine."""
    from vllm_dlm.config import aliases

    if os.path.isdir(model):
        return model
    is_alias = model in aliases.ALIASES
    return (aliases.local_folder if is_alias else aliases.cached_folder)(model)


def _show_memory(model: str, length: int) -> None:
    """What a model needs of a GPU; of a short name, also if it is not here."""
    from vllm_dlm.cli import memory
    from vllm_dlm.config import aliases

    folder = _folder_of(model)
    if folder is not None:
        needs, source = memory.measure(folder), f"{folder}/config.json"
    elif model in aliases.ALIASES:
        needs, source = memory.measure_released(model)
    else:
        raise ValueError(
            f"{model!r} is neither a folder, nor on this machine, nor a short name "
            "(vllm-dlm models lists those)"
        )
    print(memory.report(needs, source, length))
