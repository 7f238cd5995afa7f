# SPDX-License-Identifier: Apache-2.0
"""Roll-outs through an engine whose weights follow the training.

A request's step map says which step wrote each token of its text, and its frames what
was written behind that. New weights go into the running engine by vLLM's weight
transfer (`model_executor/weight_files.py`), in the layout of the model's checkpoints.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_dlm.model_executor.weight_files import BACKEND
from vllm_dlm.training.reinforcement.rollout_rows import RollOuts, empty_rows

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.outputs import CompletionOutput

    from vllm_dlm.entrypoints.frames import CanvasFrame, Write
    from vllm_dlm.training.learner import Learner
    from vllm_dlm.training.reinforcement.rollouts import Decoder

CPU_CACHE = 1 << 28
"""Bytes of keys and values that an engine on a CPU keeps, if nobody says otherwise."""


def start_engine(learner: Learner, options: Mapping[str, Any]) -> LLM:
    """An engine of the model that is trained, in this process or one beside it.

    Args:
        learner: The model.
        options: Arguments of `LLM` that are set in place of those chosen here.

    Raises:
        ValueError: an option that roll-outs depend on.
    """
    from vllm_dlm.entrypoints.llm import LLM

    fixed = {"model", "weight_transfer_config"} & options.keys()
    if fixed:
        raise ValueError(f"--engine-config: {', '.join(sorted(fixed))} cannot be set")
    chosen: dict[str, Any] = {
        "dtype": str(learner.compute_dtype).removeprefix("torch."),
        "weight_transfer_config": {"backend": BACKEND},
        "dlm_online_learning": False,
    }
    if learner.device.type == "cpu":
        chosen["kv_cache_memory_bytes"] = CPU_CACHE
    if learner.attention_block is not None:
        chosen["dlm_block_length"] = learner.attention_block
    return LLM(str(learner.source), **{**chosen, **options})


@dataclass
class EngineRoller:
    """Rolls out with an engine that gets the network's weights first.

    Where the decoder asks what ends a text (`eoser`), an answer ends with its text:
    masks behind it stay. Else whole canvases are decoded, as in the trainer.

    Args:
        llm: Of `start_engine`.
        learner: The network.
        decoder: How.
        canvas: Positions of an answer.
    """

    llm: LLM
    learner: Learner
    decoder: Decoder
    canvas: int
    _has_started: bool = field(default=False, repr=False)

    def __call__(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]
    ) -> RollOuts:
        from vllm import SamplingParams

        from vllm_dlm.entrypoints.frames import FrameCalls, watching

        self.update()
        options = self.decoder.options(self.canvas) | {"step_map": True}
        sampling = [
            SamplingParams(
                temperature=self.decoder.temperature,
                max_tokens=self.canvas,
                seed=seed,
                ignore_eos=not self.decoder.asks_for_ends,
                detokenize=False,
                extra_args={"dlm": options},
            )
            for seed in seeds
        ]
        writes: list[list[Write]] = [[] for _ in prompts]

        def note(frame: CanvasFrame) -> None:
            writes[frame.prompt] += frame.writes

        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        asks_for_ends = self.decoder.asks_for_ends
        with watching(FrameCalls(note)) if asks_for_ends else nullcontext():
            outputs = self.llm.generate(asked, sampling, use_tqdm=False)
        learner = self.learner
        rows = empty_rows(
            prompts, self.canvas, learner.mask_id, learner.end_id, learner.device
        )
        for row, output in enumerate(outputs):
            first = len(prompts[row])
            for write in writes[row]:
                self._write(rows, row, first, write)
            self._text(rows, row, first, output.outputs[0])
        return rows

    def update(self) -> None:
        """Have the engine compute with the network's weights as they are now.

        Raises:
            ValueError: keys and values of the weights before could not be dropped.
        """
        if not self._has_started:
            self.llm.init_weight_transfer_engine({"init_info": {}})
            self._has_started = True
        with tempfile.TemporaryDirectory() as folder:
            self.learner.save(folder, decoding=None)
            self.llm.start_weight_update()
            self.llm.update_weights({"update_info": {"path": str(Path(folder))}})
            self.llm.finish_weight_update()
        if not self.llm.reset_prefix_cache():
            raise ValueError(
                "the engine keeps keys and values of its weights before: requests are "
                "running that are not the roll-outs'"
            )

    def _write(self, rows: RollOuts, row: int, first: int, write: Write) -> None:
        if write.token is None or write.position >= self.canvas:
            return
        column = first + write.position
        rows.ids[row, column] = write.token
        rows.steps[row, column] = write.step
        if write.confidence is not None:
            rows.logprobs[row, column] = math.log(max(write.confidence, 1e-30))

    def _text(
        self, rows: RollOuts, row: int, first: int, output: CompletionOutput
    ) -> None:
        import torch

        from vllm_dlm.entrypoints.step_maps import step_map

        found = step_map(output)
        columns = slice(first, first + len(found.steps))
        rows.ids[row, columns] = torch.tensor(output.token_ids).to(rows.ids)
        rows.steps[row, columns] = torch.tensor(found.steps).to(rows.steps)
        rows.logprobs[row, columns] = torch.tensor(found.logprobs).to(rows.logprobs)
