# SPDX-License-Identifier: Apache-2.0
"""Short model names: "llada" for a hub checkpoint, "llada-tiny" for the built-in."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path


@dataclass(frozen=True)
class Family:
    """Checkpoints of one network."""

    name: str
    model_type: str
    """HF `model_type`, a key of `models/tables.py:HF_CONFIGS`."""
    architecture: str
    """HF architecture, a key of `models/tables.py:ARCHITECTURES`."""
    is_diffusion: bool = True
    """False for autoregressive models, which vLLM serves without us: no table of ours
    has their architectures."""


@dataclass(frozen=True)
class Alias:
    """The model that a short name stands for."""

    family: Family
    target: str
    """Hub id, or a folder below `vllm_dlm/assets` when `built_in`."""
    summary: str
    built_in: bool = False
    trained_by: str = ""
    """The argument of `vllm-dlm train` that trains a built-in model, where that is not
    its alias."""

    @property
    def path(self) -> str:
        """Hub id, or the absolute folder of a built-in model."""
        if not self.built_in:
            return self.target
        return str(files("vllm_dlm") / "assets" / self.target)


LLADA = Family("LLaDA", "llada", "LLaDAModelLM")
LLADA_MOE = Family("LLaDA-MoE", "llada", "LLaDAMoEModelLM")
LLADA2 = Family("LLaDA2", "llada2_moe", "LLaDA2MoeModelLM")
DREAM = Family("Dream", "Dream", "DreamModel")
DREAM_REASONER = Family("DreamReasoner", "Dream", "DreamForCausalLM")
SDAR = Family("SDAR", "sdar", "SDARForCausalLM")
SDAR_MOE = Family("SDAR-MoE", "sdar_moe", "SDARMoeForCausalLM")
FAST_DLLM = Family("Fast-dLLM v2", "Fast_dLLM_Qwen", "Fast_dLLM_QwenForCausalLM")
A2D_QWEN3 = Family("A2D-Qwen3", "a2d-qwen3", "A2DQwen3LMHeadModel")
A2D_QWEN2 = Family("A2D-Qwen2", "a2d-qwen2", "A2DQwen2LMHeadModel")
NEMOTRON = Family(
    "Nemotron-Labs-Diffusion", "nemotron_labs_diffusion", "NemotronLabsDiffusionModel"
)
RND1 = Family("RND1", "rnd1", "RND1LM")
STABLE_DIFFCODER = Family("Stable-DiffCoder", "llama", "StableDiffcoderForCausalLM")
LLAMA = Family("Llama", "llama", "LlamaForCausalLM", is_diffusion=False)

_QWEN3_A2D = "dllm-hub/Qwen3-0.6B-diffusion"
_QWEN2_A2D = "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion"

ALIASES: dict[str, Alias] = {
    "llada": Alias(LLADA, "GSAI-ML/LLaDA-8B-Instruct", "8B, instructions and chat"),
    "llada-base": Alias(LLADA, "GSAI-ML/LLaDA-8B-Base", "8B, plain text"),
    "llada-1.5": Alias(LLADA, "GSAI-ML/LLaDA-1.5", "8B, preference-optimised"),
    "llada-tiny": Alias(
        LLADA, "llada-tiny", "built in: small tasks, no network", built_in=True
    ),
    "llada-tiny-t2t": Alias(
        LLADA,
        "llada-tiny-t2t",
        "built in: llada-tiny, trained to edit what it has written",
        built_in=True,
    ),
    "llada-forms": Alias(
        LLADA,
        "llada-forms",
        "built in: JSON, forms with holes, tools",
        built_in=True,
    ),
    "deer-tiny": Alias(
        LLADA,
        "deer-tiny",
        "built in: drafts for llama-tiny (method deer)",
        built_in=True,
        trained_by="deer",
    ),
    "llada-moe": Alias(
        LLADA_MOE, "inclusionAI/LLaDA-MoE-7B-A1B-Instruct", "7B, 1B active, chat"
    ),
    "llada-moe-base": Alias(
        LLADA_MOE, "inclusionAI/LLaDA-MoE-7B-A1B-Base", "7B, 1B active, plain text"
    ),
    "llada2-mini": Alias(LLADA2, "inclusionAI/LLaDA2.0-mini", "16B, 1.4B active"),
    "llada2-flash": Alias(LLADA2, "inclusionAI/LLaDA2.0-flash", "100B, 6.1B active"),
    "llada2.1-mini": Alias(LLADA2, "inclusionAI/LLaDA2.1-mini", "16B, 1.4B active"),
    "llada2.1-flash": Alias(LLADA2, "inclusionAI/LLaDA2.1-flash", "100B, 6.1B active"),
    "llada2.2-mini": Alias(LLADA2, "inclusionAI/LLaDA2.2-mini", "16B, 1.4B active"),
    "llada2.2-flash": Alias(LLADA2, "inclusionAI/LLaDA2.2-flash", "100B, agents"),
    "dream": Alias(DREAM, "Dream-org/Dream-v0-Instruct-7B", "7B, instructions"),
    "dream-base": Alias(DREAM, "Dream-org/Dream-v0-Base-7B", "7B, plain text"),
    "dream-coder": Alias(DREAM, "Dream-org/Dream-Coder-v0-Instruct-7B", "7B, code"),
    "dream-coder-base": Alias(
        DREAM, "Dream-org/Dream-Coder-v0-Base-7B", "7B, code, plain text"
    ),
    "dreamon": Alias(DREAM, "Dream-org/DreamOn-v0-7B", "7B, fills holes in code"),
    "diffucoder": Alias(DREAM, "apple/DiffuCoder-7B-cpGRPO", "7B, code"),
    "diffucoder-base": Alias(DREAM, "apple/DiffuCoder-7B-Base", "7B, code, plain text"),
    **{
        f"sdar-{size.lower()}{suffix}": Alias(
            SDAR, f"JetLM/SDAR-{size}-Chat{suffix}", f"{size}, chat"
        )
        for size in ("1.7B", "4B", "8B")
        for suffix in ("", "-b8", "-b16", "-b32", "-b64")
    },
    "sdar-tiny": Alias(
        SDAR,
        "sdar-tiny",
        "built in: small tasks, block-causal, chats of several turns",
        built_in=True,
    ),
    "deer-tiny-block": Alias(
        SDAR,
        "deer-tiny-block",
        "built in: as deer-tiny, but block-causal",
        built_in=True,
        trained_by="deer --attention-block 4",
    ),
    **{
        f"sdar-30b-a3b{suffix}": Alias(
            SDAR_MOE, f"JetLM/SDAR-30B-A3B-Chat{suffix}", "30B, 3B active, chat"
        )
        for suffix in ("", "-b8", "-b32")
    },
    "trado-4b": Alias(SDAR, "Gen-Verse/TraDo-4B-Instruct", "4B, reasoning"),
    "trado-8b": Alias(SDAR, "Gen-Verse/TraDo-8B-Instruct", "8B, reasoning"),
    "trado-8b-thinking": Alias(
        SDAR, "Gen-Verse/TraDo-8B-Thinking", "8B, long reasoning"
    ),
    "tdar": Alias(SDAR, "lulululuyi/TDAR-8B-Thinking", "8B, long reasoning"),
    "fast-dllm-v2-1.5b": Alias(
        FAST_DLLM, "Efficient-Large-Model/Fast_dLLM_v2_1.5B", "1.5B, instructions"
    ),
    "fast-dllm-v2-7b": Alias(
        FAST_DLLM, "Efficient-Large-Model/Fast_dLLM_v2_7B", "7B, instructions"
    ),
    **{
        f"a2d-qwen3-0.6b-{way}": Alias(A2D_QWEN3, f"{_QWEN3_A2D}-{way}-v0.1", "0.6B")
        for way in ("mdlm", "bd3lm")
    },
    **{
        f"a2d-qwen2.5-coder-0.5b-{way}": Alias(
            A2D_QWEN2, f"{_QWEN2_A2D}-{way}-v0.1", "0.5B, code"
        )
        for way in ("mdlm", "bd3lm")
    },
    **{
        f"nemotron-diffusion-{size.lower()}": Alias(
            NEMOTRON, f"nvidia/Nemotron-Labs-Diffusion-{size}", f"{size}, chat"
        )
        for size in ("3B", "8B", "14B")
    },
    "rnd1": Alias(RND1, "radicalnumerics/RND1-Base-0910", "30B, 3B active, plain text"),
    "dream-reasoner": Alias(
        DREAM_REASONER, "Dream-org/DreamReasoner-8B", "8B, long reasoning"
    ),
    "dream-reasoner-base": Alias(
        DREAM_REASONER, "Dream-org/DreamReasoner-8B-Base", "8B, plain text"
    ),
    "stable-diffcoder": Alias(
        STABLE_DIFFCODER, "ByteDance-Seed/Stable-DiffCoder-8B-Instruct", "8B, code"
    ),
    "stable-diffcoder-base": Alias(
        STABLE_DIFFCODER,
        "ByteDance-Seed/Stable-DiffCoder-8B-Base",
        "8B, code, plain text",
    ),
    "llama-tiny": Alias(
        LLAMA, "llama-tiny", "built in: small tasks, exits", built_in=True
    ),
    "llama-tiny-draft": Alias(
        LLAMA, "llama-tiny-draft", "built in: drafts for llama-tiny", built_in=True
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
        ValueError: the alias stands for a model that this machine does not have and
            cannot fetch; the message says what to do.
    """
    alias = ALIASES.get(model)
    if alias is None or os.path.isdir(model):
        return model
    if alias.built_in:
        if local_folder(model) is None:
            raise ValueError(
                f"the built-in model {model!r} is missing from this installation; "
                "reinstall vllm-dlm, or train it with "
                f"`vllm-dlm train {alias.trained_by or model} --output-dir FOLDER` "
                "and pass the folder"
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


def is_built_in(model: str) -> bool:
    """Whether a folder, as `resolve` returns it, is that of a built-in model."""
    return any(alias.built_in and alias.path == model for alias in ALIASES.values())


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
    """Whether the hub can be reached at all; what it refuses, vLLM reports."""
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
