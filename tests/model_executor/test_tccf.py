# SPDX-License-Identifier: Apache-2.0
"""Where the first stage of `tccf` ends."""

from types import SimpleNamespace

import pytest
from canvas_requests import make_request
from vllm.v1.request import RequestStatus

from vllm_dlm.config.tccf import Stages
from vllm_dlm.model_executor.scheduling.stages import drop_its_end, is_thought_out
from vllm_dlm.option_types import ThinkCoarse

STAGES = Stages(trigger=(5, 6), check=(1, 2))


@pytest.mark.parametrize(
    ("before", "new", "count"),
    [
        ([], [], 0),
        ([], [5, 6], 2),
        ([], [4, 5, 6, 7, 8], 3),
        ([4, 5], [6, 7], 1),
        ([5], [6, 5, 6], 1),
        ([5, 6], [6, 7], 2),  # it ended before
        ([4], [5], 1),
        ([6], [4, 6, 5], 3),
    ],
)
def test_where_it_ends(before, new, count):
    assert STAGES.first_stage(before, new) == count


def test_whether_it_has_ended():
    assert STAGES.end_with([4, 5, 6])
    assert not STAGES.end_with([6])
    assert not STAGES.end_with([5, 6, 7])


@pytest.mark.parametrize(
    ("options", "max_tokens", "thoughts", "after_10"),
    [
        ({}, 100, 48, 62),  # half of them: 48, the check's 2, 50
        ({}, 30000, 25902, 10 + 2 + 4096),
        ({"critic_tokens": 20}, 100, 78, 32),
        ({"critic_tokens": 0}, 100, 98, 100),
        ({"always": False}, 100, 100, 62),
        ({"always": False, "critic_tokens": 0}, 100, 100, 100),
        ({}, 20, 8, 20),
        ({}, 2, 1, 2),
        ({}, 1, 1, 1),
    ],
)
def test_tokens_of_the_stages(options, max_tokens, thoughts, after_10):
    stages = Stages((5, 6), (1, 2), **options)
    assert stages.most_thoughts(max_tokens) == thoughts
    assert stages.most_tokens(10, max_tokens) == after_10


@pytest.mark.parametrize(
    ("output", "new", "left", "thoughts"),
    [
        ([1, 2, 3, 5, 6], 4, [2, 3], [1, 2, 3]),
        ([1, 2, 3, 5, 6], 1, [], [1, 2, 3]),  # 5 was sent before
        ([1, 5, 6], 2, [], [1]),
        ([1, 2, 7], 2, [2], [1, 2]),  # an end of text
        ([1, 2, 3], 2, [2, 3], [1, 2, 3]),  # all that thoughts may have
    ],
)
def test_what_ends_the_thoughts_is_dropped(output, new, left, thoughts):
    request = make_request(6, max_tokens=40, stages=STAGES)
    assert request.max_tokens == request.sampling_params.max_tokens == 18
    request.append_output_token_ids(output)
    request.status = RequestStatus.FINISHED_LENGTH_CAPPED
    assert is_thought_out(request, 1024)
    assert drop_its_end(request, output[-new:]) == left
    assert list(request.output_token_ids) == thoughts
    assert list(request.all_token_ids) == [*range(6), *thoughts]
    assert request.status == RequestStatus.RUNNING
    # What was sent of the trigger counts; the second stage has 20 tokens.
    sent = {1: 1}.get(new, 0)
    assert request.max_tokens == min(len(thoughts) + 2 + 20, 40 - sent)


def test_texts_become_tokens(monkeypatch):
    tokenizer = SimpleNamespace(
        encode=lambda text, add_special_tokens: [ord(sign) for sign in text.strip()],
        get_vocab_size=lambda: 128,
    )
    monkeypatch.setattr(
        "vllm.tokenizers.cached_tokenizer_from_config", lambda config: config
    )
    option = ThinkCoarse(trigger="ab", check=[3])
    assert Stages.of(option, tokenizer) == Stages((97, 98), (3,))
    assert Stages.of(None, tokenizer) is None
    with pytest.raises(ValueError, match="has no tokens"):
        Stages.of(ThinkCoarse(trigger=" ", check=[3]), tokenizer)
    monkeypatch.setattr(
        "vllm.tokenizers.cached_tokenizer_from_config", lambda config: None
    )
    with pytest.raises(ValueError, match="give token ids"):
        Stages.of(option, tokenizer)
