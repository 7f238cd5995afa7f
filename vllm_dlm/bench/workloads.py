# SPDX-License-Identifier: Apache-2.0
"""What is asked: a model, prompts, and how an answer is judged where that is known.

- `random-60m`, `random:d=64,...`: random weights of a given size, written to a folder;
  prompts are random token ids, and every answer has all its tokens.
- `llada-tiny`: the built-in model; held-out problems whose answers a program checks.
- anything else is a user's model: random prompts, or `--prompts FILE`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from vllm_dlm.bench.checkpoints import write_random
from vllm_dlm.bench.shapes import RandomModel, Shape
from vllm_dlm.config.aliases import resolve
from vllm_dlm.files.whole_files import parse_json, read_lines

BUILT_IN = "llada-tiny"


@dataclass(frozen=True)
class Gemma:
    """What is particular about DiffusionGemma, which vLLM can serve itself."""

    canvas_length: int
    numbers_per_token: int
    """Numbers in the keys and values of one token, at most."""

    @classmethod
    def of(cls, config: Any) -> Gemma | None:
        """By a model's config; None for all other models."""
        if config.model_type != "diffusion_gemma":
            return None
        # By its attributes such a config says nothing that differs between layers.
        text = config.get_text_config().to_dict()
        names = ("num_hidden_layers", "num_key_value_heads", "head_dim")
        heads = prod(text[name] for name in names)
        # Heads of full layers are wider, and pages are of one size for all layers.
        return cls(config.canvas_length, 2 * heads * 4)


@dataclass(frozen=True)
class Workload:
    """A model and prompts for it."""

    name: str
    """Name as on the command line; of a folder, its last part."""
    model: str
    """Folder, hub id or alias."""
    shape: Shape | None
    """Sizes of the model; None for a mixture of experts, which is not counted."""
    prompts: list[list[int]]
    ignore_eos: bool
    check: Callable[[int, list[int]], bool] | None = None
    """Whether these tokens answer the prompt of this index."""

    block_length: int | None = None
    """Block length that every request asks for; None leaves it to the model."""
    gemma: Gemma | None = None
    """None for other models than DiffusionGemma."""

    @property
    def temperature(self) -> float:
        """Of the requests: greedy, but 1 for DiffusionGemma, whose sampler draws, and
        of which vLLM's own code takes no other."""
        return 0.0 if self.gemma is None else 1.0

    def first(self, num: int) -> Workload:
        """This workload with its first `num` prompts only."""
        return replace(self, prompts=self.prompts[:num])

    @property
    def dense_shape(self) -> Shape:
        """The shape, for a model of equal size.

        Raises:
            ValueError: the model is a mixture of experts.
        """
        if self.shape is None:
            raise ValueError(
                "--against ar: no dense model has the size of a mixture of experts; "
                "leave ar out"
            )
        return self.shape

    @property
    def longest_prompt(self) -> int:
        """Length of the longest prompt, in tokens."""
        return max(map(len, self.prompts))


def make_workload(
    model: str,
    folder: Path,
    *,
    num_prompts: int,
    prompt_length: int,
    block_length: int | None,
    seed: int,
    prompts_file: Path | None = None,
) -> Workload:
    """Prepare a model and its prompts.

    Args:
        model: as on the command line.
        folder: where random weights are written.
        prompts_file: JSON lines with a `prompt` and, for an accuracy, an `answer`.

    Raises:
        ValueError: the model or the file is not what it should be.
    """
    if model.partition(":")[0] in ("random", "random-60m"):
        _refuse_prompts(model, prompts_file)
        random_model = RandomModel.parse(model)
        length = block_length or 32
        path = write_random(
            folder / "model", random_model, block_length=length, seed=seed
        )
        shape = random_model.shape
        if random_model.family == "diffusion_gemma":
            # The canvas' length is the checkpoint's: requests do not ask for one.
            written = make_workload(
                str(path),
                folder,
                num_prompts=num_prompts,
                prompt_length=prompt_length,
                block_length=None,
                seed=seed,
            )
            return replace(written, name=model)
        # The last two ids are the end of the text and the mask.
        prompts = _random_prompts(
            num_prompts, prompt_length, range(shape.vocabulary - 2), seed
        )
        # SDAR's is declared in its config, and no request may change it.
        asked = length if random_model.family == "llada" else None
        return Workload(
            model, str(path), shape, prompts, ignore_eos=True, block_length=asked
        )
    if model == BUILT_IN:
        _refuse_prompts(model, prompts_file)
        return replace(_tiny_tasks(num_prompts, seed), block_length=block_length)
    config = _read_config(model)
    name = Path(model).name if Path(model).is_dir() else model
    text_shape = Shape.from_hf_config(config.get_text_config())
    gemma = Gemma.of(config)
    if prompts_file is not None:
        prompts, check = _read_prompts(prompts_file, model, num_prompts)
        return Workload(
            name, model, text_shape, prompts, False, check, block_length, gemma
        )
    return Workload(
        name,
        model,
        text_shape,
        _random_prompts(num_prompts, prompt_length, _text_ids(config), seed),
        ignore_eos=True,
        block_length=block_length,
        gemma=gemma,
    )


def _refuse_prompts(model: str, prompts_file: Path | None) -> None:
    if prompts_file is not None:
        raise ValueError(f"--prompts: {model} has prompts of its own")


def _random_prompts(
    num: int, length: int, ids: Sequence[int], seed: int
) -> list[list[int]]:
    draw = random.Random(seed)
    return [draw.choices(ids, k=length) for _ in range(num)]


def _tiny_tasks(num: int, seed: int) -> Workload:
    from vllm_dlm.tasks.problems import sample_problems
    from vllm_dlm.tasks.tokenizer import decode, encode_prompt

    problems = sample_problems(num, seed, "heldout")
    return Workload(
        BUILT_IN,
        BUILT_IN,
        Shape.from_hf_config(_read_config(BUILT_IN)),
        [encode_prompt(problem.question, chat=False) for problem in problems],
        ignore_eos=False,
        check=lambda index, tokens: problems[index].check(decode(tokens)),
    )


def _read_config(model: str) -> Any:
    from vllm.transformers_utils.config import get_config

    from vllm_dlm.plugin import register

    register()
    return get_config(resolve(model), trust_remote_code=False)


def _text_ids(config: Any) -> list[int]:
    """All tokens but the mask, what may end a text, and what stands for an image."""
    text = config.get_text_config()
    eos = getattr(text, "eos_token_id", None)
    special = {
        getattr(text, "mask_token_id", None),
        *(eos if isinstance(eos, list) else [eos]),
        *getattr(config, "dlm_stop_ids", ()),
        *(
            getattr(config, f"{name}_token_id", None)
            for name in ("image", "boi", "eoi")
        ),
    }
    return [i for i in range(text.vocab_size) if i not in special]


def _read_prompts(
    path: Path, model: str, num: int
) -> tuple[list[list[int]], Callable[[int, list[int]], bool] | None]:
    from vllm.tokenizers import get_tokenizer

    tokenizer = get_tokenizer(resolve(model))
    records: list[dict[str, Any]] = []
    for number, line in enumerate(read_lines(path, "prompts (--prompts)"), 1):
        if len(records) == num:
            break
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise ValueError(
                f"--prompts {path}, line {number}: expected an object with a `prompt` "
                "and perhaps an `answer`, both texts"
            )
        records.append(record)
    if len(records) < num:
        raise ValueError(
            f"--prompts {path} has {len(records)} prompts; --requests {num} needs more"
        )
    prompts = [list(tokenizer.encode(record["prompt"])) for record in records]
    if not all("answer" in record for record in records):
        return prompts, None

    def check(index: int, tokens: list[int]) -> bool:
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        return str(records[index]["answer"]).strip() == text.strip()

    return prompts, check
