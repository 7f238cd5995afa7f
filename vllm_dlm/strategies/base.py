# SPDX-License-Identifier: Apache-2.0
"""The strategy contract: declarations, a view in, a decision out.

A strategy is a pure function over `[R, B]` tensors: R rows (requests that decode
with it in this step) by B block positions. It sees statistics, never logits rows of
other requests, never Python lists; it must not call `.item()` nor loop over rows.
What it wants to remember it declares (`Strategy.state`), reads from the view and
returns with the decision; the engine keeps it by slot and forgets it with the block.
Everything that keeps decoding safe (mask-id ban, progress, step caps, NaN) belongs
to the engine (`views.py` and `safety.py` in `model_executor/sampling/`) and is the
same for all strategies. The contract is one file, for who writes a strategy to read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, model_validator

from vllm_dlm.strategies.presets import PRESET, Preset, filled
from vllm_dlm.strategies.probabilities import Probabilities

T = TypeVar("T")


class Params(BaseModel):
    """Base of a strategy's parameters: frozen, strict about unknown names.

    Float and int fields may differ between the requests of one batch: they reach
    `Strategy.select` as `[R]` tensors. All other fields (modes, paths) split a batch
    into groups and are read from `Strategy.params`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    presets: ClassVar[Mapping[str, Preset]] = {}
    """Name -> values that were published together, which the parameter `preset` stands
    for. Parameters set beside it win."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        has_presets = cls.presets and isinstance(given, Mapping)
        return filled(cls.presets, given) if has_presets else given


# Inside `Strategy` the name `Params` is that strategy's own class.
AnyParams: TypeAlias = Params


@dataclass(frozen=True)
class StateField:
    """Something a strategy remembers of each request, for as long as a block lasts.

    No longer: a preempted request replays its block, so that what came from earlier
    blocks could not be had again.
    """

    shape: tuple[int, ...] = ()
    """Of one request's value; () is a single number."""
    dtype: torch.dtype = torch.float32
    fill: float = 0.0
    """The value in a block's first step."""


class SoftInputs(NamedTuple):
    """What a strategy feeds positions in place of the embedding of a token.

    Only engines that make input embeddings themselves can do it: those of models that
    declare `dlm_soft_inputs`, and servers with `--dlm-soft-inputs`.
    """

    source: Literal["full", "top"]
    """What is mixed. "full": the embeddings of all tokens, by their probabilities in
    this step. "top": those of `num_ids` tokens, which each decision names."""
    law: Literal["add", "replace", "condition"]
    """What becomes of the mixture m and of the embedding e of the token that stands
    there: e + m, or m alone, or what the model makes of both (`condition`)."""
    num_ids: int = 1
    """K: tokens that are mixed where the source is "top"; else 1."""
    keeps_norm: bool = False
    """Of "top": the mixture is as long as its parts are on average, by weight:
    `sum(w |e|)` in place of its own length."""


class Soft(NamedTuple):
    """Where the next forward of a block is fed mixtures, and which.

    It lasts for that forward: what is to stay soft is decided in every step. A position
    whose keys and values become final is never soft: with a block's end all of this is
    forgotten.
    """

    where: torch.Tensor
    """[R, B] bool: positions of the output that are soft; not those that a client has
    written or been sent. With the source "full", rows that this step has read."""
    weights: torch.Tensor
    """[R, B, K] float32: of each token; of the whole mixture with the source "full"."""
    ids: torch.Tensor | None = None
    """[R, B, K] int64: the tokens; None with the source "full"."""


NOT_DRAFTED = 1 << 30
"""Rank of a position without a draft."""


def in_branch(rank: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """Whether a draft of this rank is written in this branch; of any shape, bool."""
    return torch.where(rank < 0, rank == -branch, rank < branch)


@dataclass(frozen=True)
class Branches:
    """What one forward made of the canvas and of drafts of it: K canvases a row.

    In branch j the masked positions of a rank below j, and those of rank -j, hold their
    draft tokens; branch 0 is the canvas itself. Not all drafts are evaluated, if the
    strategy can do without (`needs_branches`): the engine makes fewer branches where
    room is short. In a block's first step there is one.
    """

    tokens: torch.Tensor
    """[R, B] int64: draft tokens, as the last step's decision named them."""
    rank: torch.Tensor
    """[R, B] int64: as in the decision; `NOT_DRAFTED` for none."""
    masked: torch.Tensor
    """[R, K, B] bool: positions still to be decided; none if it was not evaluated."""
    candidate: torch.Tensor
    """[R, K, B] int64."""
    confidence: torch.Tensor
    """[R, K, B] float32."""
    later: torch.Tensor | None = None
    """[R, K, B] bool: masks of parts to the right of those in `masked`, which come in
    their turn; None where the strategy does not look ahead (`Strategy.looks_ahead`)."""
    part: torch.Tensor | None = None
    """[R, B] int64: the part of the canvas that each position belongs to: parts are
    written from the left. None as `later`."""


@dataclass(frozen=True)
class View:
    """What a strategy sees in one step; every tensor is on the engine's device.

    Shapes: R rows, B block length. Only statistics named in `Strategy.needs` are set,
    except `confidence`, which always is. Where a position is decided already,
    candidate and statistics are the model's present opinion of it, nothing drawn, if
    the strategy reads it (`Strategy.logit_rows`); else its token, and 0.
    """

    tokens: torch.Tensor
    """[R, B] int64: tokens of the active block; the mask id where still masked."""
    masked: torch.Tensor
    """[R, B] bool: positions still to be decided."""
    valid: torch.Tensor
    """[R, B] bool: False beyond the canvas end (short last block)."""
    decided: torch.Tensor
    """[R, B] bool: positions of the output that hold a token, not the prompt's."""
    positions: torch.Tensor
    """[R, B] int64: index in the output; negative in the prompt."""
    candidate: torch.Tensor
    """[R, B] int64: token that would be written (drawn, or the argmax)."""
    confidence: torch.Tensor
    """[R, B] float32: untempered probability of `candidate`."""
    is_eos: torch.Tensor
    """[R, B] bool: `candidate` ends the text, and this request honours that."""
    step: torch.Tensor
    """[R] int64: denoise steps already spent on this block."""
    scheduled: torch.Tensor
    """[R] int64: tokens the integer step schedule writes in this step (at least 1)."""
    steps: torch.Tensor
    """[R] int64: denoise steps of this block by the step schedule (at least 1)."""
    progress: torch.Tensor
    """[R] float32: share of the longest output that holds tokens, 0 to 1."""
    state: Mapping[str, torch.Tensor]
    """name of `Strategy.state` -> [R, ...]: as the last step of the block left it."""
    entropy: torch.Tensor | None = None
    """[R, B] float32, nats, of the untempered distribution (need "entropy")."""
    margin: torch.Tensor | None = None
    """[R, B] float32: best minus second-best probability (need "margin")."""
    uniform: torch.Tensor | None = None
    """[R, B] float32 in [0, 1): seeded per request, position, step (need "uniform")."""
    other: torch.Tensor | None = None
    """[R, B] int64: the best token besides `candidate` and `Context.edit_tokens` (need
    "other"); of no meaning where the strategy does not read the position."""
    best: torch.Tensor | None = None
    """[R, B] int64: the most probable token of those that the request allows, whatever
    is drawn (need "best"); the token itself where the position is not read. Where a
    text must match a pattern, see `Strategy.writes`."""
    best_confidence: torch.Tensor | None = None
    """[R, B] float32: its probability, as `confidence` (need "best"); 0 as that."""
    noise: torch.Tensor | None = None
    """[R, B] int64: the random token that each position holds in the next step, if it
    is to hold one (need "noise"); seeded per request, position, step."""
    probabilities: Probabilities | None = None
    """Of any token (need "probabilities")."""
    branches: Branches | None = None
    """The canvas and its drafts (need "branches")."""
    num_masks: torch.Tensor | None = None
    """[R] int64: masks for a schedule to divide. Among them are those that the cache
    policy `window` keeps for later steps; None where all of them are `masked`."""

    @property
    def masks(self) -> torch.Tensor:
        """[R, B] bool: all masks of the block; `masked` may be those of a part."""
        return self.valid & ~self.decided & (self.positions >= 0)

    def masks_to_divide(self) -> torch.Tensor:
        """[R] int64: see `num_masks`."""
        return self.masked.sum(dim=1) if self.num_masks is None else self.num_masks

    def take(self, rows: slice | np.ndarray, width: int) -> View:
        """The view of some rows (a slice, or [n] int64), cut to `width` columns."""
        index: slice | torch.Tensor = (
            rows
            if isinstance(rows, slice)
            else torch.from_numpy(rows).to(self.masked.device, non_blocking=True)
        )

        def pick(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: tensor[index] for name, tensor in value.items()}
            if isinstance(value, Probabilities):
                return replace(value, rows=value.rows[rows][:, :width])
            if isinstance(value, Branches):
                parts = {
                    name: part[index][..., :width]
                    for name, part in vars(value).items()
                    if part is not None
                }
                return Branches(**parts)
            if value is None:
                return None
            some = value[index]
            return some[:, :width] if some.dim() == 2 else some

        return View(**{name: pick(value) for name, value in vars(self).items()})


@dataclass
class Decision:
    """What a strategy decides in one step. Only `commit` is required."""

    commit: torch.Tensor
    """[R, B] bool: masked positions to write `new_tokens` (or the candidates) to."""
    new_tokens: torch.Tensor | None = None
    """[R, B] int64: tokens to write where they differ from `View.candidate`."""
    edit: torch.Tensor | None = None
    """[R, B] bool: decided positions to overwrite (needs `may_rewrite`)."""
    remask: torch.Tensor | None = None
    """[R, B] bool: decided positions to mask again (needs `may_rewrite`)."""
    hold: torch.Tensor | None = None
    """[R] bool: keep the block open although no mask is left."""
    truncate_at: torch.Tensor | None = None
    """[R] int64: cut the canvas right after this block position; -1 cuts nothing."""
    idle: torch.Tensor | None = None
    """[R] bool: a step that writes nothing is meant; no token is forced into it."""
    state: Mapping[str, torch.Tensor] | None = None
    """name of `Strategy.state` -> [R, ...]: to remember; what is missing stays."""
    branch: torch.Tensor | None = None
    """[R, B] int64: the branch in which each committed token was predicted; or 0."""
    step_ahead: torch.Tensor | None = None
    """[R, B] int64: which step each token was committed in, where one forward does
    several steps of the procedure that is followed (drafts); the first is 0."""
    draft_tokens: torch.Tensor | None = None
    """[R, B] int64: tokens to evaluate the next canvas with (`Strategy.branches`)."""
    draft_rank: torch.Tensor | None = None
    """[R, B] int64: the order in which branches add them, from 0; or -j, for a token
    that is in branch j alone; `NOT_DRAFTED` for none."""
    soft: Soft | None = None
    """What positions are fed in the next forward beside tokens (`Strategy.soft`)."""
    held: torch.Tensor | None = None
    """[R, B] int64: tokens that open positions hold in the next forward, of models
    without a mask (`Strategy.noise`). They are not written: nothing is said of them to
    the client."""
    settled: torch.Tensor | None = None
    """[R, B] int64: the step since which each token that is written has been the best
    one, for step maps; None: this step."""


class Strategy:
    """One decoding rule. Subclass it, set the declarations, write `select`."""

    name: ClassVar[str]
    """The registered name, as in `--dlm-strategy NAME`."""
    paper: ClassVar[str]
    """Source: an arXiv id or repository."""
    summary: ClassVar[str]
    """One line for `vllm-dlm strategies`."""
    Params: ClassVar[type[Params]] = Params
    needs: frozenset[str] = frozenset()
    """Extra statistics, of: "entropy", "margin", "uniform", "other", "best", "noise",
    "probabilities", "branches". The class names all that it may ever read; `__init__`
    may narrow it to what its parameters call for."""
    state: Mapping[str, StateField] = {}
    """What is remembered from step to step; `__init__` may set it by parameters."""
    logit_rows: ClassVar[str] = "masked"
    """"masked": only masked positions' statistics are read; "block": all of them.

    Rows that are not read do not go through lm_head."""
    may_rewrite: bool = False
    """Whether decisions may edit or remask decided positions; `__init__` may set it.
    `logit_rows` must be "block" then."""
    scope: ClassVar[Literal["block", "blocks", "canvas"]] = "block"
    """"canvas": made for the whole output as one block, which is then the default
    block length. Models that decode block after block cannot serve it. "blocks": the
    same with full attention; with block attention, `View`s are of several of the
    model's blocks, none of which sees the ones behind it."""
    verifies: ClassVar[bool] = False
    """Whether it writes one token after the other, as a causal model would, after steps
    that draft: see `LinearSpec`. Then the views are of the B positions behind the text,
    B being the model's block length. `View.step` is 0 where they are masks that see
    each other, to be drafted, and 1 where the drafts stand in their places and each
    position is predicted by the one to its left; behind the prompt there are no drafts.
    For causal models with leads."""
    measures: ClassVar[Literal["model", "drawn"]] = "model"
    """Of which distribution the statistics are: the model's own, or the one that is
    drawn from, after temperature and top-k/p."""
    noise: ClassVar[Literal["mask", "uniform"]] = "mask"
    """What the models that it is for hold where nothing is decided: the mask, or random
    tokens (`Decision.held`). It serves no model of the other kind."""
    eotp: ClassVar[Literal["off", "block", "token", "canvas"]] = "off"
    """Default of the option `eotp`."""
    schedule: ClassVar[bool | Mapping[str, Any]] = False
    """Whether it follows the step schedule, which the options `steps` and
    `steps_per_block` set: reads `View.scheduled` or `View.steps`. A mapping names the
    parameters with which it does. Who sets the options for another is refused."""
    counts_out: ClassVar[bool] = False
    """Whether it writes as many masks as the step schedule says, in any case, where it
    follows that: then a block's last step is known before. (A guess is made of it,
    which is checked; docs/performance.md, asynchronous scheduling.)"""
    is_shared: ClassVar[bool] = True
    """Whether requests to come are likely to have the same parameters: then an object
    without requests is kept for them. Not where each request sends its own."""

    def __init__(self, params: AnyParams, block_length: int, context: Context) -> None:
        """Build the strategy of one group of requests.

        Args:
            params: validated parameters; numeric fields here are those of the first
                request of the group only: read them from `select`'s `row_params`.
            block_length: B of every view this instance will see.
            context: engine facts (device, model folder, cache policy).

        Raises:
            ValueError: the parameters do not fit the model or the block length.
                Check in `validate` what a request can get wrong: an error here comes
                too late for the user to see.
        """
        self.params = params
        self.block_length = block_length
        self.context = context

    def step_limit(self, params: AnyParams) -> int:
        """Steps after which the engine ends a block, writing all masks left.

        With B steps every position has had its turn; what rewrites gets as many again.

        Args:
            params: of the request; `self.params` has another one's numbers.
        """
        return self.block_length * (2 if self.may_rewrite else 1)

    @classmethod
    def follows_schedule(cls, params: AnyParams) -> bool:
        """Whether it follows the step schedule with these parameters."""
        if isinstance(cls.schedule, bool):
            return cls.schedule
        return all(getattr(params, name) == v for name, v in cls.schedule.items())

    def reference_steps(self, params: AnyParams, steps: int) -> int | None:
        """Steps after which the published loop ends a block, masks left or not.

        Masks that are left are text then, with `reference_exact`. None: that loop goes
        on until there are none, and so does the engine, to `step_limit`. A loop that
        counts out a schedule ends with it.

        Args:
            params: of the request.
            steps: S of its step schedule, at most the block length.
        """
        return steps if self.follows_schedule(params) else None

    needs_branches: ClassVar[bool] = False
    """Whether what it decides depends on how many branches are evaluated. Then all of
    them are, in every step but a block's first, or the request waits."""

    @classmethod
    def needs_with(cls, params: AnyParams) -> frozenset[str]:
        """What it may need with these parameters, of `needs`.

        Override it where "probabilities" or "branches" are for some parameters only:
        the host serves these, so that such requests cannot be scheduled ahead.

        Args:
            params: of the request.
        """
        return cls.needs

    @classmethod
    def branches(cls, params: AnyParams) -> int:
        """Canvases that one forward of a request evaluates at most; 1 without drafts.

        Args:
            params: of the request.
        """
        return 1

    @classmethod
    def looks_ahead(cls, params: AnyParams) -> int:
        """Positions behind the active block that a forward may draft and write too.

        B of the views is then the block length and this number, rounded up to whole
        blocks; where something looks at each step, the block length alone. For models
        whose finished blocks keep their keys and values.

        Args:
            params: of the request.
        """
        return 0

    @classmethod
    def soft(cls, params: AnyParams) -> SoftInputs | None:
        """What its decisions feed beside tokens (`Decision.soft`); None for nothing.

        Not together with branches, nor with looking ahead.

        Args:
            params: of the request.
        """
        return None

    def temperature(
        self, step: torch.Tensor, row_params: Mapping[str, torch.Tensor]
    ) -> torch.Tensor | None:
        """By what logits are divided in a step, whatever the request asks for.

        Of the statistics that `measures` = "drawn" names, and of the mixture that the
        source "full" makes. Draws divide by the request's own temperature besides.

        Args:
            step: [R] int64, as in the view.
            row_params: as of `select`.

        Returns:
            [R] float32, above 0; None for 1.
        """
        return None

    @classmethod
    def sets_temperature(cls) -> bool:
        """Whether it says by what logits are divided (`temperature`)."""
        return cls.temperature is not Strategy.temperature

    writes: ClassVar[Literal["candidate", "best"]] = "candidate"
    """Which tokens of the view its decisions write. With "best", where a text must
    match a pattern, the best tokens belong together too: they are the most probable
    text that matches, beside the drawn one that the candidates are. What decisions
    write must be of that text then, and none may cut the canvas."""
    own_tokens: ClassVar[bool] = False
    """Whether it may write other tokens than those that `writes` names, or cut the
    canvas elsewhere than behind a candidate that is an end of text. Then texts that
    must match a pattern cannot be decoded by it: their tokens belong together."""
    heeds_patterns: ClassVar[bool] = False
    """Whether it does nothing of the kind where `Context.has_pattern` says that texts
    must match: requests with a pattern then get an object of their own. Of `branches`,
    it writes what one branch holds and predicts, and drafts what that predicts."""

    @classmethod
    def why_unconstrained(cls, params: AnyParams) -> str | None:
        """Why it cannot decode a text that must match a pattern; None where it can.

        Args:
            params: of the request.
        """
        unaware = cls.needs_with(params) & {"branches", "other", "best"}
        unaware -= {cls.writes}
        if cls.looks_ahead(params):
            return "it writes blocks before those to their left are final"
        if unaware and not cls.heeds_patterns:
            return f"it reads View.{min(unaware)}, which knows nothing of patterns"
        if cls.own_tokens and not cls.heeds_patterns:
            return "it writes tokens of its own choice"
        return None

    def is_current(self) -> bool:
        """Whether it may decide requests to come, too; else they get a new object.

        All tensor-parallel workers must say the same. Running requests keep this one.
        """
        return True

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        """Decide one step for R rows.

        Args:
            view: statistics and canvas of the active blocks.
            row_params: numeric parameter name -> [R] tensor (float32 or int64).
        """
        raise NotImplementedError

    @classmethod
    def validate(cls, params: AnyParams, block_length: int, context: Context) -> None:
        """Check parameters against the model at admission.

        Raises:
            ValueError: they do not fit; the message says what would.
        """


class EditTokens(NamedTuple):
    """Ids of the tokens by which a model changes a text's length; they are no text."""

    delete: int
    """Predicted at a position that is to go."""
    insert: int
    """Predicted at a position that a mask is to come before."""


def _of_this_worker(value: Any) -> Any:
    """What `Context.agreed` is where there is one worker."""
    return value


@dataclass(frozen=True)
class Context:
    """Engine facts a strategy may need when it is built."""

    device: torch.device
    model: str
    """Folder or hub id the engine was started with."""
    model_key: str = ""
    """Stable key of the model's weights and shape, to file learned filters under."""
    attention: str = "full"
    """`full` sees the whole canvas; `block` and `causal` decode block after block."""
    cache: str = "none"
    """KV policy that is served: a name of `config/cache.py`."""
    own_block: int = 32
    """Positions of a block as the model has them, whatever a request asks for."""
    options: Mapping[str, Any] | None = None
    """Server-level options (folder for learned filters, ...)."""
    positions: int | None = None
    """Output positions that the request may write, whole blocks; where it is known."""
    has_pattern: bool = False
    """Whether the texts must match patterns; see `Strategy.heeds_patterns`. Candidates
    of masks are parts of one text that matches then, and those of decided positions
    can take their places in it, all or some of them."""
    vocab_size: int | None = None
    """Token ids are below this number; where requests are checked."""
    mask_id: int | None = None
    """Of the mask."""
    edit_tokens: EditTokens | None = None
    """What the model predicts where the text is too long or too short; None for a
    model that edits no lengths."""
    agreed: Callable[[Any], Any] = _of_this_worker
    """The first worker's value of what each worker finds for itself, on disks that may
    differ. All tensor-parallel workers must call it when a strategy is built."""


def parameter_names(params: type[Params]) -> list[str]:
    """Names that may be set among a strategy's parameters, `preset` included."""
    return [*params.model_fields, *([PRESET] if params.presets else [])]


def numeric_fields(params: type[Params]) -> list[str]:
    """Names of the parameters that may differ from row to row, in field order."""
    return [
        name
        for name, field in params.model_fields.items()
        if field.annotation in (int, float)
    ]


def given(statistic: T | None, need: str) -> T:
    """A part of the view that a strategy has named in `needs`.

    Raises:
        ValueError: it is not set.
    """
    if statistic is None:
        raise ValueError(f"the strategy needs View.{need}, which is not set")
    return statistic


def best_masked(view: View) -> torch.Tensor:
    """[R, B] bool: each row's most confident masked position (lowest on ties)."""
    return best_of(view.masked, view.confidence)


def best_of(among: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """[..., B] bool: the best position of each row; none where none competes.

    Args:
        among: [..., B] bool: positions that compete.
        score: [..., B]; ties go to the lowest position.
    """
    best = torch.zeros_like(among)
    ranked = torch.where(among, score, -torch.inf)
    best.scatter_(-1, ranked.argmax(dim=-1, keepdim=True), True)
    return best & among


def top_masked(view: View, score: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """[R, B] bool: each row's `count` best masked positions by `score`.

    Args:
        score: [R, B]; only masked positions compete, ties go to the lowest position.
        count: [R] int64.
    """
    return top_of(view.masked, score, count)


def top_of(
    among: torch.Tensor, score: torch.Tensor, count: torch.Tensor
) -> torch.Tensor:
    """[R, B] bool: each row's `count` [R] best positions; `among` as in `ranks`."""
    return (ranks(among, score) < count[:, None]) & among


_COUNTED = 64
"""Longest block in which `ranks` compares every two positions."""


def ranks(among: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """[R, B] int64: places by falling `score`, from 0; all others come after `among`.

    Args:
        among: [R, B] bool: positions that compete.
        score: [R, B]; ties go to the lowest position.
    """
    score = torch.where(among, score.double(), -torch.inf)
    places = torch.arange(score.shape[1], device=score.device)
    if len(places) <= _COUNTED:
        # Who comes before each: no sort, which compilers cannot fuse with the rest.
        own, other = score[:, :, None], score[:, None, :]
        left = places < places[:, None]
        return ((other > own) | ((other == own) & left)).sum(dim=2)
    order = torch.argsort(score, dim=1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(1, order, places.expand_as(order))
