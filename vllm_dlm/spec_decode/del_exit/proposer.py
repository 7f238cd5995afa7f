# SPDX-License-Identifier: Apache-2.0
"""DEL in vLLM: the target's lower layers draft, on the target's own KV cache.

No second model is loaded. A draft step feeds one token per request, the newest: the
keys and values of all earlier ones are the target's. What it writes goes to the
request's lookahead slots, which verification writes anew. The hidden states behind
each exit come from the verifying forward itself (vLLM's auxiliary hidden states), so
statistics grow in rounds without a draft as well. Drafts are verified as point masses:
exact at any temperature, whatever ends a draft. The rules are in `exits.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_dlm.config.stop_ids import stop_ids
from vllm_dlm.spec_decode.del_exit.exits import (
    PROMPT_WINDOW,
    Choice,
    ExitStatistics,
    goes_on,
    resolve_exits,
    top_token,
)
from vllm_dlm.spec_decode.drafter import Batch, Drafter, Drafts
from vllm_dlm.spec_decode.options import Del, request_limit
from vllm_dlm.vllm_objects import replace

if TYPE_CHECKING:
    pass

SUPPORTED = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
"""vLLM's model classes whose layers can be run one by one as `EarlyExit` does."""

SHADOW_ROWS = 256
"""Rows of logits held at a time: a batch of long prompts would fill the memory."""

UNKNOWN = -1


class EarlyExit:
    """A model's own embedding, lower layers, final norm and lm_head."""

    def __init__(self, target: Any) -> None:
        """Take the parts of a loaded model.

        Raises:
            ValueError: a model whose layers are not known to work alone.
        """
        name = type(target).__name__
        if name not in SUPPORTED:
            raise ValueError(
                f"speculative method 'del' cannot draft with the layers of {name}: it "
                f"knows how those of {', '.join(SUPPORTED)} are chained"
            )
        self.embed = target.embed_input_ids
        self.layers = target.model.layers
        self.norm = target.model.norm
        self.head = target.compute_logits
        self.attention_names = [
            layer.self_attn.attn.layer_name for layer in self.layers
        ]
        windows = {layer.self_attn.attn.sliding_window for layer in self.layers}
        if len(windows) > 1:
            raise ValueError(
                "speculative method 'del' needs attention of one kind in all layers; "
                f"those of this {name} have the windows {windows}"
            )

    def run(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        start: int,
        stop: int,
    ) -> tuple[torch.Tensor, Any]:
        """[N, H] hidden states and residual behind the layers `start` to `stop`."""
        for layer in self.layers[start:stop]:
            hidden, residual = layer(positions, hidden, residual)
        return hidden, residual

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, V] from [N, H] hidden states, residual added."""
        return self.head(self.norm(hidden))


@dataclass
class Request:
    """What is remembered of a request between its rounds."""

    statistics: ExitStatistics
    counted: int = 0
    """Positions below this one are in the statistics."""


@dataclass(frozen=True)
class Round:
    """What one request drafted in one round; see `DelProposer.rounds`."""

    request_id: str
    num_tokens: int
    acceptance: tuple[float, ...]
    """Share of each exit's drafts that the target accepted."""
    choice: Choice
    tokens: tuple[int, ...]


class DelProposer(Drafter):
    """Drafts with the target's layers. `counts`: "forwards" draft steps, "rows" drafted
    tokens, "layer_rows" layers times rows computed for them, "shadow_rows" rows through
    lm_head for the statistics."""

    options: Del

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, runner: Any
    ) -> None:
        super().__init__(vllm_config, device, runner)
        self.requests: dict[str, Request] = {}
        self.shared: ExitStatistics | None = None
        self.rounds: list[Round] | None = None
        """Set it to a list to have every round written down."""

    def load_model(self, target_model: Any) -> None:
        """Share the target's layers, and ask it for the hidden states of the exits.

        Raises:
            ValueError: a target that cannot draft for itself.
        """
        if self.vllm_config.lora_config is not None:
            raise ValueError("speculative method 'del' does not support LoRA adapters")
        self.model = EarlyExit(target_model)
        self.num_layers = len(self.model.layers)
        self.exits = resolve_exits(self.options.exits, self.num_layers)
        self.forget()
        self._draft_attn_layer_names = set(self.model.attention_names[: self.exits[-1]])
        # The runner reads both after this. The last layer's states tell what the
        # target itself says at a prompt's positions.
        replace(self.runner, "use_aux_hidden_state_outputs", True)
        self.draft_model_config.hf_config.eagle_aux_hidden_state_layer_ids = (
            *self.exits,
            self.num_layers,
        )

    def forget(self) -> None:
        """Start the statistics of all requests anew."""
        self.requests.clear()
        shared = self.options.statistics == "shared"
        self.shared = self._new_statistics() if shared else None

    def dummy_run(self, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Nothing: the target's own dummy runs go through all of its layers."""

    def draft(self, batch: Batch) -> Drafts:
        """Learn from the step that is over, then draft where it pays."""
        self._learn(batch)
        plan = {
            int(row): self._statistics(batch.request_ids[row]).choose(
                self.num_layers, int(batch.limits[row])
            )
            for row in np.flatnonzero(batch.limits)
        }
        tokens = self._draft_rows(batch, plan)
        if self.rounds is not None:
            for row, choice in plan.items():
                request_id = batch.request_ids[row]
                self.rounds.append(
                    Round(
                        request_id,
                        int(batch.num_tokens[row]),
                        tuple(self._statistics(request_id).acceptance.tolist()),
                        choice,
                        tuple(tokens[row]),
                    )
                )
        return Drafts(tokens)

    def _statistics(self, request_id: str) -> ExitStatistics:
        return self.shared or self.requests[request_id].statistics

    def _learn(self, batch: Batch) -> None:
        """Count the step's new positions: hits and misses of each exit."""
        for request_id in self.requests.keys() - self.runner.requests.keys():
            del self.requests[request_id]
        starts = batch.attention.query_start_loc_cpu.numpy()
        computed = batch.attention.seq_lens_cpu_upper_bound.numpy()
        # What others taught is not drowned in prompts: of each, only the position
        # that writes.
        taught = self.shared is not None and self.shared.counts.any()
        window = 1 if taught else PROMPT_WINDOW
        indices, expected, updates = [], [], []
        for row, request_id in enumerate(batch.request_ids):
            parameters = batch.parameters[row]
            if not request_limit(parameters.extra_args, self.num_speculative_tokens):
                continue
            request = self.requests.setdefault(
                request_id, Request(self.shared or self._new_statistics())
            )
            prompt = self.runner.requests[request_id].num_prompt_tokens
            end = int(computed[row])
            first = end - int(starts[row + 1] - starts[row])
            begin = max(first, request.counted, prompt - window)
            if begin >= end:
                continue
            request.counted = end
            positions = np.arange(begin, end)
            following = batch.token_ids[row, positions + 1]
            # What was accepted behind the end of the text is no part of it.
            ends = np.isin(following, list(stop_ids(parameters)))
            ends &= positions >= prompt - 1
            if ends.any():
                positions = positions[: ends.argmax() + 1]
                following = following[: len(positions)]
            indices.append(starts[row] + positions - first)
            # In a prompt the target's own prediction counts, not what was written.
            expected.append(np.where(positions < prompt - 1, UNKNOWN, following))
            updates.append((request.statistics, len(positions), begin >= prompt))
        if not indices:
            return
        rows = torch.from_numpy(np.concatenate(indices)).to(self.device)
        hits, confidences = self._compare(
            batch.target_hidden_states[rows], np.concatenate(expected)
        )
        if self.shared is not None:
            self.shared.update(hits, confidences)
            return
        at = 0
        for statistics, count, new_round in updates:
            part = slice(at, at + count)
            statistics.update(hits[part], confidences[part], new_round)
            at += count

    def _compare(
        self, states: torch.Tensor, expected: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Whether each exit says what the target says, and how sure it is.

        Args:
            states: [N, (E + 1) * H] hidden states behind each exit and the last layer.
            expected: [N] the target's tokens, UNKNOWN where its lm_head has to say it.

        Returns:
            [N, E] bool and [N, E] float32.
        """
        states = states.view(len(expected), len(self.exits) + 1, -1)
        unknown = np.flatnonzero(expected == UNKNOWN)
        flat = torch.cat([states[:, :-1].flatten(0, 1), states[unknown, -1]])
        self.counts["shadow_rows"] += len(flat)
        found = [top_token(self.model.logits(part)) for part in flat.split(SHADOW_ROWS)]
        tokens = torch.cat([token for token, _ in found]).cpu().numpy()
        sure = torch.cat([confidence for _, confidence in found]).cpu().numpy()
        shape = (len(expected), len(self.exits))
        shadows = shape[0] * shape[1]
        expected = expected.copy()
        expected[unknown] = tokens[shadows:]
        hits = tokens[:shadows].reshape(shape) == expected[:, None]
        return hits, sure[:shadows].reshape(shape)

    def _draft_rows(self, batch: Batch, plan: dict[int, Choice]) -> list[list[int]]:
        """R drafts: greedy, each row as far as its choice and `stop` say."""
        drafts: list[list[int]] = [[] for _ in batch.request_ids]
        alive = sorted(
            (row for row, choice in plan.items() if choice.length),
            key=lambda row: plan[row].exit,
        )
        stops = {row: stop_ids(batch.parameters[row]) for row in alive}
        products = dict.fromkeys(alive, 1.0)
        newest = batch.next_token_ids[alive]
        step = 0
        while alive:
            hidden = self._forward(
                newest,
                batch.num_tokens[alive] - 1 + step,
                np.array([plan[row].exit for row in alive]),
                batch.attention.block_table_tensor[alive],
            )
            tokens, confidences = top_token(self.model.logits(hidden))
            step += 1
            self.counts["forwards"] += 1
            self.counts["rows"] += len(alive)
            going = []
            for place, (row, token, confidence) in enumerate(
                zip(alive, tokens.tolist(), confidences.tolist(), strict=True)
            ):
                drafts[row].append(token)
                products[row] *= confidence
                if token not in stops[row] and goes_on(
                    self.options.stop, plan[row], step, confidence, products[row]
                ):
                    going.append(place)
            alive = [alive[place] for place in going]
            newest = tokens[going]
        return drafts

    def _forward(
        self,
        tokens: torch.Tensor,
        positions: np.ndarray,
        exits: np.ndarray,
        block_table: torch.Tensor,
    ) -> torch.Tensor:
        """One draft step: [N, H] hidden states of N tokens, each behind its exit.

        Rows share the layers that they have in common, and leave one by one.

        Args:
            tokens: [N], one per request.
            positions: [N] int64.
            exits: [N], ascending.
            block_table: [N, blocks].
        """
        hidden = self.model.embed(tokens)
        residual: Any = None  # the first layer starts it
        places = torch.from_numpy(positions).to(self.device)
        left, start = [], 0
        for stop in np.unique(exits):
            with self._attention(
                positions[-len(hidden) :], block_table[-len(hidden) :]
            ):
                hidden, residual = self.model.run(
                    hidden, residual, places[-len(hidden) :], start, stop
                )
            self.counts["layer_rows"] += len(hidden) * int(stop - start)
            leaving = int((exits == stop).sum())
            left.append(hidden[:leaving] + residual[:leaving])
            hidden, residual = hidden[leaving:], residual[leaving:]
            start = stop
        return torch.cat(left)

    @contextmanager
    def _attention(
        self, positions: np.ndarray, block_table: torch.Tensor
    ) -> Iterator[None]:
        """vLLM's forward context of one token per request, at `positions` [N]."""
        count = len(positions)
        lengths = torch.from_numpy(positions + 1).int()
        places = torch.from_numpy(positions).to(self.device)
        blocks = block_table.gather(1, (places // self.block_size)[:, None]).squeeze(1)
        starts = torch.arange(count + 1, dtype=torch.int32)
        slots = blocks.long() * self.block_size + places % self.block_size
        _, metadata = self.build_per_group_and_layer_attn_metadata(
            CommonAttentionMetadata(
                query_start_loc=starts.to(self.device),
                query_start_loc_cpu=starts,
                seq_lens=lengths.to(self.device),
                seq_lens_cpu_upper_bound=lengths,
                num_reqs=count,
                num_actual_tokens=count,
                max_query_len=1,
                max_seq_len=int(lengths.max()),
                block_table_tensor=block_table,
                slot_mapping=slots,
            )
        )
        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=count,
            slot_mapping=dict.fromkeys(self._draft_attn_layer_names, slots),
        ):
            yield

    def _new_statistics(self) -> ExitStatistics:
        return ExitStatistics(self.exits, self.options.decay)
