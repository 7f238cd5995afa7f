# SPDX-License-Identifier: Apache-2.0
"""The reference: end of text, and upstream's mask id, on a model that says a script."""

from __future__ import annotations

import pytest
from reference.procedures import (
    ReferenceResult,
    generate,
    static,
    threshold,
)
from reference.scripted import EOS, MASK, ScriptedModel, scripted


def test_eos_stop_waits_for_masks_to_its_left():
    script = [(1, 0.5), (2, 0.6), (EOS, 0.9), (3, 0.8)]
    assert scripted(script) == ReferenceResult([1, 2, EOS], 4, [3, 2, 0])
    script = [(1, 0.9), (EOS, 0.8), (3, 0.5), (3, 0.6)]
    assert scripted(script) == ReferenceResult([1, EOS], 2, [0, 1])
    # An EOS of the prompt ends nothing.
    result = generate(
        ScriptedModel([(1, 0.9)] * 5),
        [EOS],
        gen_length=4,
        block_length=4,
        rule=static(),
    )
    assert result.tokens == [1] * 4


@pytest.mark.parametrize("eotp", ["first", "paper"])
def test_eotp_cuts_after_the_first_eos_just_committed(eotp):
    script = [(1, 0.5), (EOS, 0.95), (2, 0.6), (EOS, 0.95)] + [(3, 0.9)] * 4
    result = scripted(
        script, gen_length=8, rule=threshold(0.9), eotp=eotp, eos_stop=False
    )
    assert result == ReferenceResult([1, EOS], 2, [1, 0])


def test_eotp_first_cuts_at_the_leftmost_sure_eos_of_the_active_block():
    script = [(1, 0.99), (EOS, 0.7), (EOS, 0.91), (EOS, 0.98)] + [(EOS, 0.985)] * 4
    options = {"gen_length": 8, "eos_stop": False}
    result = scripted(script, eotp="first", **options)
    # Cut after position 2, which commits next; the 0.7 is committed, not cut, then.
    assert result == ReferenceResult([1, EOS], 3, [0, 2])
    result = scripted(script, eotp="first", eot_threshold=0.6, **options)
    assert result == ReferenceResult([1, EOS], 2, [0, 1])
    assert scripted(script, eotp="first", eot_threshold=0.99, **options).forwards > 2


@pytest.mark.parametrize(
    ("cache", "eot_threshold", "ends"),
    [
        ("none", 0.9, [16, 8, 8]),  # the first sure end is at 6
        ("none", 0.95, [16, 12, 12]),  # at 8
        ("none", 1.0, [16, 16, 16]),
        ("prefix", 0.9, [16, 8, 8]),
        ("dual", 0.9, [16, 4, 4]),  # later steps compute the block alone
    ],
)
def test_eotp_canvas_cuts_behind_the_block_of_the_first_sure_eos(
    cache, eot_threshold, ends
):
    script = [(1, 0.6)] * 4 + [(EOS, 0.3), (2, 0.99), (EOS, 0.91), (EOS, 0.2)]
    model = ScriptedModel(script + [(EOS, 0.99)] * 8)
    generate(
        model,
        [],
        gen_length=16,
        block_length=4,
        rule=threshold(0.9),
        cache=cache,
        eotp="canvas",
        eot_threshold=eot_threshold,
        eos_stop=False,
    )
    assert [end for _, end, _ in model.calls[:3]] == ends


@pytest.mark.parametrize(("shift", "cut"), [(0, 8), (1, 12)])
def test_eotp_canvas_looks_at_rows_right_of_the_block_only(shift, cut):
    """With a shift, a row of the block predicts the first position behind it."""
    script = [(1, 0.6)] * 4 + [(2, 0.6)] * 12
    script[4 - shift], script[9 - shift] = (EOS, 0.95), (EOS, 0.95)
    model = ScriptedModel(script)
    options = {"gen_length": 16, "block_length": 4, "rule": threshold(0.99)}
    generate(model, [], eotp="canvas", shift=shift, eos_stop=False, **options)
    assert model.calls[1][1] == cut


def test_eotp_paper_cuts_at_the_most_confident_eos_of_the_canvas():
    script = [(1, 0.99), (2, 0.8), (EOS, 0.2), (2, 0.8)] + [(2, 0.5), (EOS, 0.3)] * 2
    options = {"gen_length": 8, "eos_stop": False}
    result = scripted(script, eotp="paper", **options)
    # Tie between 5 and 7: cut after 5. Then block 0 as usual, and its own EOS cuts.
    assert result.tokens == [1, 2, EOS] and result.forwards == 4
    sizes: list[int] = []
    scripted(
        [*script[:2], (1, 0.2), *script[3:6], (1, 0.5), (1, 0.5)],
        eotp="paper",
        observe=lambda view, _: sizes.append(len(view.masked)),
        **options,
    )
    assert sizes == [4, 4, 4, 4, 2, 2]


@pytest.mark.parametrize(
    ("cache", "calls"),
    [
        ("none", [(0, 10, 0), (0, 5, 0), (0, 5, 0)]),
        ("prefix", [(0, 10, 10), (2, 5, 5), (2, 5, 5)]),
        ("dual", [(0, 10, 10), (2, 5, 5), (2, 5, 5)]),
    ],
)
def test_eotp_cut_rows_are_neither_computed_nor_seen(cache, calls):
    script = [(0, 0.5)] * 2 + [(1, 0.5), (2, 0.6), (EOS, 0.9)] + [(3, 0.8)] * 5
    model = ScriptedModel(script)
    result = generate(
        model,
        [1, 1],
        gen_length=8,
        block_length=4,
        rule=static(),
        cache=cache,
        eotp="first",
        eos_stop=False,
    )
    assert result == ReferenceResult([1, 2, EOS], 3, [2, 1, 0])
    assert model.calls == calls  # first row, one past the last, length of the store


def test_mask_id_is_banned_unless_allowed():
    script = [(1, 0.5), (MASK, 0.9), (2, 0.6), (3, 0.8)]
    assert MASK not in scripted(script).tokens
    # Allowed: it wins every step, is chosen every step, and stays masked.
    result = scripted(script, forbid_mask=False)
    assert result == ReferenceResult([MASK] * 4, 4, [-1] * 4)
    with pytest.raises(RuntimeError, match="no progress"):
        scripted(script, forbid_mask=False, rule=threshold(0.9))
    # A mask left behind competes again in the next block, as upstream's loop has it.
    script = [(1, 0.5), (MASK, 0.55), (2, 0.6), (3, 0.8)]
    result = scripted(script, block_length=2, forbid_mask=False)
    assert result == ReferenceResult([MASK, MASK, 2, 3], 4, [-1, -1, 3, 2])
