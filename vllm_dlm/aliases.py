# SPDX-License-Identifier: Apache-2.0
"""Short model names: "llada" for a hub checkpoint, "llada-tiny" for the built-in."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path


@dataclass(frozen=True)
class Alias:
    """What a short name stands for."""

    target: str
    """Hub id, or a folder below `vllm_dlm/assets` when `built_in`."""
    model_type: str
    """The checkpoint's HF `model_type`, a key of `plugin.HF_CONFIGS`."""
    summary: str
    built_in: bool = False

    @property
    def path(self) -> str:
        """Hub id, or the absolute folder of a built-in model."""
        if not self.built_in:
            return self.target
        return str(files("vllm_dlm") / "assets" / self.target)


ALIASES: dict[str, Alias] = {
    "llada": Alias("GSAI-ML/LLaDA-8B-Instruct", "llada", "8B, instructions and chat"),
    "llada-base": Alias("GSAI-ML/LLaDA-8B-Base", "llada", "8B, plain text"),
    "llada-1.5": Alias("GSAI-ML/LLaDA-1.5", "llada", "8B, preference-optimised"),
    "llada-tiny": Alias(
        "llada-tiny", "llada", "built in: small tasks, no network", built_in=True
    ),
}


def resolve(
    model: str, revision: str | None = None, token: bool | str | None = None
) -> str:
    """The folder or hub id that `model` stands for.

    An existing folder wins over an alias of the same name; a name that is no alias is
    returned as it is.

    Args:
        model: what the user typed.
        revision: branch, tag or commit of the hub checkpoint.
        token: Hugging Face token, as `huggingface_hub` takes it.

    Raises:
        ValueError: the alias stands for something that cannot be had here; the
            message says what to do.
    """
    alias = ALIASES.get(model)
    if alias is None or os.path.isdir(model):
        return model
    if alias.built_in:
        if local_folder(model) is None:
            raise ValueError(
                f"the built-in model {model!r} is missing from this installation; "
                "reinstall vllm-dlm, or train it with "
                f"`vllm-dlm train {model} --output-dir FOLDER` and pass the folder"
            )
        return alias.path
    if (
        os.environ.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true")
        or cached_folder(alias.target, revision) is not None
        or _hub_answers(alias.target, revision, token)
    ):
        return alias.target
    raise ValueError(
        f"{model!r} stands for {alias.target}, which is not in the local Hugging Face "
        "cache, and the hub cannot be reached; run "
        f"`hf download {alias.target} --local-dir FOLDER` on a machine with network "
        "access and pass that folder, or use the built-in `llada-tiny`"
    )


def local_folder(name: str) -> str | None:
    """Folder of an alias's model on this machine, or None; asks no network."""
    alias = ALIASES[name]
    if alias.built_in:
        return alias.path if (Path(alias.path) / "config.json").is_file() else None
    return cached_folder(alias.target)


def cached_folder(repo_id: str, revision: str | None = None) -> str | None:
    """Snapshot folder of a checkpoint in the local hub cache, weights included."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    has_weights = next(folder.glob("*.safetensors"), None) is not None
    return str(folder) if has_weights else None


def _hub_answers(repo_id: str, revision: str | None, token: bool | str | None) -> bool:
    """Whether the hub can be asked at all; its refusals are left to vLLM to report."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if constants.HF_HUB_OFFLINE:
        return False
    url = hf_hub_url(repo_id, "config.json", revision=revision)
    try:
        # The request and the timeout with which the download itself would begin.
        get_hf_file_metadata(url, token=token, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except HfHubHTTPError:
        return True
    except (OfflineModeIsEnabled, OSError):
        return False
    except Exception as error:
        # The HTTP client's own errors; which client that is depends on the version.
        if "http" in type(error).__module__.partition(".")[0]:
            return False
        raise
    return True
