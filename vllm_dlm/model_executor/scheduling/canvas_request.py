# SPDX-License-Identifier: Apache-2.0
"""CanvasRequest: a vLLM request that counts blocks, a canvas, and rows to compute.

Where its blocks and its canvas lie is in its `RequestLayout` (`layout.py`); how far the
request has come is counted here. The file is long because these counts are one state:
what a forward computes next follows from all of them.
"""

from __future__ import annotations

from collections import deque
from copy import copy
from typing import TYPE_CHECKING, NamedTuple

from vllm.v1.metrics.stats import RequestSpecDecodeMetrics
from vllm.v1.request import Request, RequestStatus

from vllm_dlm.config.cache import FAR
from vllm_dlm.config.carried import CANVAS_END, WATCHED
from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.request import RequestConfig
from vllm_dlm.config.stop_ids import stop_ids
from vllm_dlm.config.tccf import Stages, one_at_a_time
from vllm_dlm.model_executor.layout import (
    ALWAYS,
    Limits,
    RequestLayout,
    Rows,
    lay_out,
    part_rows,
    plan_rows,
    scheduled_steps,
    verified_rows,
)
from vllm_dlm.model_executor.reply import take_ends
from vllm_dlm.model_executor.running_ahead import ends_by_count
from vllm_dlm.model_executor.step_maps import StepCount

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.kv_cache_utils import BlockHash


class Forward(NamedTuple):
    """A forward of one request that was scheduled."""

    rows: Rows
    """Of one canvas."""
    branches: int
    """Canvases that it evaluates."""


class CanvasRequest(Request):
    """A vLLM request with a canvas; `adopt` makes it of one that vLLM has built."""

    # What was asked for, and of which model and server.
    dlm: RequestConfig
    """The request's options, `sized`; in the second stage of `tccf`, of that stage."""
    model: ModelDefaults
    """What the model declares."""
    limits: Limits
    """The server's."""
    stages: Stages | None
    """What is left of `tccf`; None without it, and in its second stage."""
    most_tokens: int
    """`max_tokens` of the whole output; vLLM's is that of the stage."""
    stop_ids: frozenset[int]
    """Token ids that end the text."""
    closing_ids: frozenset[int]
    """Those that fill no hole of a canvas; set by the scheduler."""
    commits_alone: bool
    """A finished block's KV is written by a forward of its own (option `commit`)."""
    max_branches: int
    """Canvases that one forward may evaluate (`planning/branches.py`)."""
    needs_branches: bool
    """It evaluates that many in every step but a block's first, or waits."""
    is_looked_up: bool
    """Pages are being looked for that it may share: for all but the last of
    `num_tokens`, as vLLM does, and for none of its first block. A replay decides the
    block again, and would write to pages of others that have decided it alike."""
    ahead: int
    """Positions behind the active block that a forward computes too: whole blocks."""
    runs_ahead: bool
    """A forward is scheduled before the outcome of the last one is there: see
    `running_ahead.py`. What is known of the request is then what it was before
    that one."""

    watched: int | None
    """Who watches its canvas (`WATCHED`), if anybody does."""

    blocks_ahead: int
    """Blocks that a forward computes which is scheduled so, of a `block` model without
    leads (option `async_blocks`)."""

    # Where its blocks and its canvas lie.
    layout: RequestLayout
    """Made at every admission, the first and those after a preemption."""
    canvas_end: int
    """Absolute position one past the canvas's last token."""
    block_canvas_end: int
    """`canvas_end` when the active block began: where a replay of it starts from."""

    # How far it has come.
    steps: StepCount
    """Its denoise steps."""
    frontiers: list[int]
    """How many tokens there were before the active block's first step, and after each
    step of it. Kept at a preemption: a replay computes the same rows again."""
    masks_ends: list[int | None]
    """Beside them, where the worker says that the next step's rows end; None for the
    canvas's end."""
    said_end: int | None
    """What the worker has said of that with the last step."""
    is_filled: bool
    """The last step has left no mask in its elastic hole: the text ends."""
    kv_final: int
    """Leading positions whose KV never changes again; 0 with full attention."""
    refreshed_block: int
    """Start of the block whose surroundings the KV pages hold; -1 for none."""
    drafted_block: int
    """Start of the block that the last forward has left drafts of; -1 for none."""

    # What its next forward computes, and when its last one was; the scheduler sets
    # `allotted` and `last_step`.
    rows_end: int
    """One past the last position of the rows to compute."""
    branches: int
    """Canvases that the forward evaluates."""
    branch_rows: int
    """Rows of each of them, if there are several."""
    allotted: int
    """Rows that the token budget has room for; of a running request."""
    last_step: int
    """The scheduler's step that it last took part in; -1 for none."""
    in_flight: deque[Forward]
    """Those whose outcome is not there yet, in order; what was in flight at a
    preemption is among them, and is dropped when it comes."""

    # vLLM's own attributes that are changed here.
    cache_salt: object
    """Requests share pages only if their salts are equal. A client gives a text or
    None; in the second stage of `tccf` it is what no client can give."""
    block_hashes: list[BlockHash]
    """Hashes of its full pages."""
    num_computed_tokens: int
    """Where the next forward's rows begin, once `plan_step` has said so."""

    @classmethod
    def adopt(
        cls,
        request: Request,
        config: RequestConfig,
        model: ModelDefaults,
        limits: Limits,
        *,
        stages: Stages | None,
        commits_alone: bool,
        max_branches: int,
        needs_branches: bool,
        ahead: int = 0,
    ) -> CanvasRequest:
        """Give a new request, which vLLM has built, its canvas.

        The request itself is returned, its class changed to this one, which counts its
        tokens otherwise. The model's stop ids are added to its sampling parameters.

        Args:
            request: a text-only request that has not been scheduled.
            config: its options, `sized`.
            model: what the model declares.
            limits: the server's.
            stages: those of the option `tccf`, if it is set.
            commits_alone: the server's option `commit` is "separate".
            max_branches: canvases that one forward of it may evaluate.
            needs_branches: its strategy needs all of them.
            ahead: positions behind its active block that a forward computes too.
        """
        params = request.sampling_params
        if not params.ignore_eos:
            # Ids that end a text but are known to the tokenizer only.
            params.stop_token_ids = sorted(
                {*(params.stop_token_ids or ()), *model.stop_ids}
            )
        request.__class__ = cls
        assert isinstance(request, cls)
        request.dlm = config
        request.model = model
        request.limits = limits
        request.watched = (params.extra_args or {}).get(WATCHED)
        request.stages, request.most_tokens = stages, request.max_tokens
        if stages is not None:
            # It ends where its first stage does at the latest (`stages.py`).
            most = stages.most_thoughts(request.max_tokens)
            request.set_max_tokens(most, copy(params))
        request.stop_ids = stop_ids(params)
        request.commits_alone = commits_alone
        request.max_branches, request.ahead = max_branches, ahead
        request.needs_branches, request.is_looked_up = needs_branches, False
        request.runs_ahead, request.blocks_ahead = False, 1
        # Forwards and tokens per forward, on every request's output.
        written = 0 if config.canvas is None else config.canvas.handed_along
        request.spec_decode_metrics = RequestSpecDecodeMetrics.new(
            config.window + written
        )
        request._lay_out()
        request.open_canvas()
        request.steps = StepCount()
        request._note_block(request.layout.first_block)
        request.last_step = -1
        request.in_flight, request.said_end = deque(), None
        request.is_filled = False
        request.allotted = request.branch_rows = 0
        request._begin()
        return request

    @property
    def num_tokens(self) -> int:
        """Tokens so far; while waiting, all rows that its first forward computes."""
        if self.is_looked_up:
            return min(self.rows_end, self.layout.first_block + 1)
        if self.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
            return self.rows_end
        return len(self._all_token_ids)

    @property
    def num_tokens_with_spec(self) -> int:
        """Position up to which vLLM schedules the next forward's rows."""
        return self.rows_end

    @property
    def block_start(self) -> int:
        """Absolute position of the active block's first token."""
        return self.layout.block_at(len(self._all_token_ids))

    @property
    def lacks_lead(self) -> bool:
        """Whether the rows left of the active block are to decide its lead."""
        block = self.block_start
        begins = self.model.leads_blocks and len(self._all_token_ids) <= block
        return begins and not self.layout.is_written(block)

    @property
    def step(self) -> int:
        """Denoise steps that the active block has had."""
        return self.steps.in_block if self.steps.block == self.block_start else 0

    # -- canvas and stages -------------------------------------------------

    def open_canvas(self) -> None:
        """Open a canvas for the output, or for what is left of it."""
        self.canvas_end = self.layout.canvas_from(len(self._all_token_ids))
        self.block_canvas_end = self.canvas_end

    def set_max_tokens(self, max_tokens: int, params: SamplingParams) -> None:
        """Of a stage; `params` are those by which the workers lay it out."""
        params.max_tokens = max_tokens
        self.sampling_params, self.max_tokens = params, max_tokens

    def enter_second_stage(self) -> None:
        """Decode one token at a time from now on, as the option `tccf` says.

        The caller must preempt the request then: KV of the tokens so far depends on
        their blocks. Only requests in this stage can share the pages that it fills.
        """
        self.stages = None
        self.dlm = one_at_a_time(self.dlm)
        self.cache_salt = ("blocks of 1", self.cache_salt)
        self.block_hashes = []
        self.update_block_hashes()
        self._lay_out()
        self.open_canvas()

    def start_over(self) -> None:
        """Forget what was computed, because the request is preempted.

        It will replay its active block, on the canvas of the time when that began.
        """
        self.canvas_end = self.block_canvas_end
        self._lay_out()
        self._begin()
        if self.layout.reach.refresh_right < FAR:
            # The worker sees no forward that would show it the canvas whole.
            params = self.sampling_params
            params.extra_args = {
                **(params.extra_args or {}),
                CANVAS_END: self.canvas_end,
            }

    def _lay_out(self) -> None:
        """Lay the request out with the tokens that it has by now."""
        self.layout = lay_out(
            self.dlm,
            self.model,
            self.limits,
            prompt_len=self.num_prompt_tokens,
            num_known=len(self._all_token_ids),
            max_tokens=self.max_tokens,
        )

    def _begin(self) -> None:
        """Set the progress to the start of the layout's first block, without any KV."""
        self.refreshed_block = self.drafted_block = -1
        self.branches = 1
        first_block = self.layout.first_block
        self.steps.enter(first_block)
        self.steps.in_block, self.steps.joined = self.layout.first_step, 0
        if self.frontiers[0] != first_block:
            self._note_block(first_block)
        self.kv_final = 0
        self.rows_end = self.next_rows().end

    # -- rows of a forward -------------------------------------------------

    def next_rows(self) -> Rows:
        """Rows that the request's next forward computes, of one canvas."""
        block, length = self.block_start, self.layout.block_length
        if self.layout.is_full:
            reach, step = self.layout.reach, self.step
            is_cut = reach.ends_early and self.canvas_end < self.block_canvas_end
            masks_end = self.masks_ends[step]
            if step == 0 and self.layout.canvas is not None:
                masks_end = self.layout.masks_end(block, reach.refresh_right)
            return plan_rows(
                reach,
                step=step,
                is_first_block=block <= self.num_prompt_tokens,
                block_start=block,
                block_length=length,
                phase=ALWAYS if is_cut else self._last_refresh(step),
                masks_end=masks_end,
                canvas_end=self.canvas_end,
            )
        is_new = self.step == 0 and self.lacks_lead
        if self.layout.verifies:
            is_new = self.model.leads_blocks and block == self.layout.first_block
        if is_new:
            # The rows left of the block, which are finished now, predict its lead. They
            # do so once, also if they predict the mask id (`reference_exact`).
            return Rows(self.kv_final, block)
        if self.layout.verifies:
            return verified_rows(
                length=self.layout.window,
                block_start=block,
                canvas_end=self.canvas_end,
            )
        if self.commits_alone and self.kv_final < block != self.layout.first_block:
            return Rows(self.kv_final, block)
        # What is finished but not final (the block before this one, or the prompt)
        # and the block itself: no forward is spent on writing final KV alone.
        end = min(block + length + self.ahead, self.canvas_end)
        step = self.step
        if step <= self.model.begins_with_lead(block, self.num_prompt_tokens):
            return Rows(self.kv_final, end)
        # In a replay, fewer tokens than are known were there before this step.
        frontier = len(self._all_token_ids)
        if step < len(self.frontiers):
            frontier = self.frontiers[step]
        return part_rows(
            self.layout.reach, block_start=block, block_end=end, frontier=frontier
        )

    def plan_step(self) -> None:
        """Fix the rows of the next forward; of one canvas, until `take_branches`.

        vLLM computes what `num_tokens_with_spec` has beyond `num_computed_tokens`: no
        rows of a request that sits this step out, because the outcome of its last one
        must be known first.
        """
        rows = self.rows_ahead() if self.is_waited_for else self.next_rows()
        self.branches = 1
        if rows is None:
            self.rows_end = self.num_computed_tokens
        else:
            self.num_computed_tokens, self.rows_end = rows

    @property
    def sits_out(self) -> bool:
        """Whether it does not take part in the step that is being planned."""
        return self.num_computed_tokens == self.rows_end

    def planned_rows(self) -> Rows:
        """Rows of the next forward, as `plan_step` has fixed them if it runs."""
        if self.status != RequestStatus.RUNNING:
            return self.next_rows()
        return Rows(self.num_computed_tokens, self.rows_end)

    @property
    def is_waited_for(self) -> bool:
        """Whether a forward is in flight whose outcome will count."""
        return self.num_in_flight_tokens > self.num_stale_output_tokens

    def rows_ahead(self) -> Rows | None:
        """Rows of the forward behind the one in flight; None if they cannot be guessed.

        The same rows again: a block that is finished by then is committed by them, or
        predicts the next one's lead. `running_ahead.py` has the rule.
        """
        if not self.runs_ahead:
            return None
        rows, block = self.in_flight[-1].rows, self.block_start
        if self.is_void(rows) or rows.end < block:
            return self.next_rows()
        length = self.layout.block_length
        end, blocks = min(block + length, self.canvas_end), self.blocks_ahead
        if rows.end > block and self._is_last_step():
            if end == self.canvas_end:
                return None  # the text or the canvas is at its end
            blocks = 2
        if self.layout.is_full:
            return self.next_rows()
        if blocks == 2 and not self.model.leads_blocks:
            end = min(end + length, self.canvas_end)
        # What is in flight has computed what is left of the block.
        return Rows(self.kv_final, end)

    def is_void(self, rows: Rows) -> bool:
        """Whether a forward of these rows decides nothing, because they were guessed.

        The device finds the same (`planning/guesses.py`).
        """
        if self.layout.is_full:
            return rows.end != self.canvas_end
        block, length = self.block_start, self.layout.block_length
        block_end = min(block + length, self.canvas_end)
        ends = [block_end]
        if self.model.attention == "block":
            # The next block is computed along in vain, and changes nothing.
            ends.append(min(block_end + length, self.canvas_end))
        return rows.end > block and rows.end not in ends

    def _is_last_step(self) -> bool:
        """Whether the step in flight finishes the active block, by its schedule."""
        if not ends_by_count(self.dlm):
            return False
        block, prompt_len = self.block_start, self.num_prompt_tokens
        block_end = min(block + self.layout.block_length, self.canvas_end)
        steps = scheduled_steps(
            block_end - max(block, prompt_len),
            self.layout,
            self.model,
            begins_with_lead=self.model.begins_with_lead(block, prompt_len),
        )
        return self.step + 1 >= steps

    def useful_branches(self) -> int:
        """How many canvases the next forward can learn from; 1 without drafts."""
        block, drafted = self.block_start, self.drafted_block
        has_drafts = drafted == block or (self.ahead > 0 and drafted >= 0)
        if not has_drafts or self.next_rows().end <= block:
            return 1
        if self.needs_branches:
            # Also in a replay, which knows more tokens than there were.
            return self.max_branches
        end = block + self.layout.block_length + self.ahead
        # One for each mask, as far as the scheduler knows: for each missing token.
        missing = min(end, self.canvas_end) - len(self._all_token_ids)
        return max(min(self.max_branches, missing), 1)

    def keys_end(self, rows_end: int) -> int:
        """One past the last key that the rows of a canvas see.

        Args:
            rows_end: one past the last of these rows.
        """
        return self.canvas_end if self.layout.is_full else rows_end

    def take_branches(self, count: int) -> None:
        """Have the next forward evaluate several canvases."""
        start, end = self.next_rows()
        self.branches, self.branch_rows = count, end - start
        self.rows_end = start + count * self.branch_rows

    def whole_rows(self, start: int, end: int) -> int:
        """How many of the rows [start, end) one forward may compute.

        With full attention, rows are computed together or not at all, as are those of a
        branch. Other requests may compute their prompt in chunks, which end where a
        block ends.
        """
        if end == self.rows_end:
            return end - start
        if self.branches > 1 and self.needs_branches:
            return 0
        if self.branches > 1:
            return (end - start) // self.branch_rows * self.branch_rows
        block = self.block_start
        is_first = block == self.layout.first_block
        # Behind a block, a request may have written many blocks itself.
        most = 2 * self.layout.block_length
        is_long = self.layout.canvas is not None and self.rows_end - start > most
        if self.layout.is_full or not (is_first or is_long):
            return 0
        return max(min(self.layout.attended_at(end), block) - start, 0)

    def note_computed(self, rows: Rows) -> None:
        """Note that the next forward computes these rows."""
        block = self.block_start
        self.refreshed_block = block
        self.drafted_block = block if rows.end > block else -1
        if not self.layout.is_full:
            # The keys of a draft are not those of text.
            is_round = self.layout.verifies and rows.end > block
            self.kv_final = rows.start if is_round else min(rows.end, block)

    def canvas_rows(self, rows: Rows) -> int:
        """How many rows of a forward are of the canvas.

        0 if the forward decides nothing, because it computes a part of the prompt or a
        finished block's KV, or rows that were guessed and are not wanted.
        """
        start, end, block = *rows, self.block_start
        if self.runs_ahead and self.is_void(rows):
            return 0
        if self.layout.is_full:
            return end - max(start, self.num_prompt_tokens)
        if end > block:
            end = min(end, block + self.layout.window)
            return end - max(block, start, self.num_prompt_tokens)
        # The rows left of the block decide one token of it: its lead.
        return int(end == block and self.lacks_lead)

    # -- the outcome of a step -----------------------------------------------

    def take_tokens(self, tokens: list[int]) -> None:
        """Take over what a denoise step says of this request, and count the step.

        Args:
            tokens: the request's tokens of the worker's reply, changed in place: what
                is left of them is text, to be appended.
        """
        canvas_end, self.said_end = take_ends(tokens)
        if canvas_end is not None:
            if self.layout.growth.expansion and canvas_end > self.canvas_end:
                # The forward wrote nothing: the block begins anew.
                self.canvas_end = canvas_end
                return
            if not self.layout.is_elastic:
                canvas_end = min(self.canvas_end, canvas_end)
            self.canvas_end = canvas_end
        # Tokens that became final behind the end of the text are padding.
        del tokens[self.num_tokens_to_stop(tokens) :]
        if self.stages is not None:
            del tokens[self.stages.first_stage(self.output_token_ids, tokens) :]
        self.note_step()
        canvas = self.layout.canvas
        if canvas is not None and canvas.is_elastic:
            # All of it is handed out at once, when it has no mask.
            end = len(self._all_token_ids) + len(tokens) + canvas.hidden
            self.is_filled = end == self.canvas_end
            if self.is_filled and len(tokens) < self.max_tokens:
                self._end_text(tokens)

    def num_tokens_to_stop(self, tokens: list[int]) -> int:
        """How many of the tokens that follow the output belong to the text."""
        barred = self.num_barred(tokens)
        for count, token in enumerate(tokens[barred:], start=barred + 1):
            if token in self.stop_ids:
                return count
        return len(tokens)

    def num_barred(self, tokens: list[int]) -> int:
        """How many of the tokens that follow the output cannot end the text.

        Behind them is something that the request has written itself.
        """
        canvas = self.layout.canvas
        if canvas is None:
            return 0
        if canvas.is_elastic:
            return len(tokens)
        # A suffix is never handed out: an end in front of it ends the text.
        end = canvas.pins_end if canvas.handed is None else 0
        return min(max(end - 1 - self.num_output_tokens, 0), len(tokens))

    def _end_text(self, tokens: list[int]) -> None:
        """Put an end behind a text that none has ended, in place.

        vLLM takes the last token of a text that ends before its `max_tokens` for that,
        and shows what is left of it; and a text has a token.
        """
        if not tokens or tokens[-1] not in self.closing_ids:
            own = self.sampling_params.eos_token_id
            ends = self.model.stop_ids or self.closing_ids
            tokens.append(min(ends) if own is None else own)

    def note_step(self) -> None:
        """Count a denoise step; its tokens are not appended yet."""
        self.steps.enter(self.block_start)
        self.steps.in_block += 1

    def go_on(self) -> None:
        """Go on behind the appended tokens, if need be on a further canvas."""
        self.note_frontier()
        if self.num_tokens == self.canvas_end:
            self.open_canvas()
        elif self.refreshed_block != self.block_start:
            self.block_canvas_end = self.canvas_end
        if self.is_waited_for:
            # What it does depends on what is known now.
            self.note_computed(self.in_flight[-1].rows)

    def note_frontier(self) -> None:
        """Note how far the text has come, for a replay of the active block."""
        if self.frontiers[0] != self.block_start:
            self._note_block(self.block_start)
        elif self.step == len(self.frontiers):
            self.frontiers.append(len(self._all_token_ids))
            self.masks_ends.append(self.said_end)

    def _note_block(self, start: int) -> None:
        """Note that a block begins."""
        self.frontiers, self.masks_ends = [start], [None]

    def _last_refresh(self, step: int) -> int:
        """The frontier before the last refresh of the block, if the steps count out
        when refreshes are."""
        return self.frontiers[step - step % self.layout.reach.refresh_every]

    def was_cut(self) -> bool:
        """Whether the text ends here because the strategy has cut the canvas here.

        A cut inside a block ends the text, also without a stop token. A cut at a
        block's end drops padding only: the text goes on, on a further canvas.
        """
        end = self.num_tokens
        return end == self.canvas_end < self.block_canvas_end and (
            end != self.block_start
        )
