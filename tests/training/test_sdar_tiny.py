# SPDX-License-Identifier: Apache-2.0
"""sdar-tiny: what it learns from, its plain decoder, and the model that is shipped."""

import random
from pathlib import Path

import pytest

from vllm_dlm.config.aliases import resolve
from vllm_dlm.tasks import tokenizer
from vllm_dlm.tasks.problems import TASKS, sample_problems
from vllm_dlm.training.loop import LoopOptions
from vllm_dlm.training.tiny import sdar_data, sdar_stages, sdar_tiny

torch = pytest.importorskip("torch")

EOS, EOT = tokenizer.EOS_ID, tokenizer.TOKEN_IDS[tokenizer.EOT]


def test_a_chat_of_two_turns_in_two_streams():
    turns = [([1, 50, 51, 52], [60, 61, 62, 63, 64, 65]), ([53, 54], [66, 67])]
    text = sdar_data.lay_out_turns(turns, 4)
    whole = [1, 50, 51, 52, 60, 61, 62, 63, 64, 65, EOT, 53, 54, 66, 67]
    # The last answer's last block, from 12 on, is in the masked stream only.
    assert text.clean == whole[:12]
    full, rest = 1.0, sdar_data.PADDING_WEIGHT
    assert text.masked == [
        *((60 + place, 4 + place, 0, full) for place in range(6)),
        *((EOS, 10, 0, full), (EOS, 11, 0, full)),
        # The second prompt's last token begins the second answer's block.
        *((54, 12, 1, 0.0), (66, 13, 1, full), (67, 14, 1, full), (EOS, 15, 1, full)),
    ]
    [short] = [sdar_data.lay_out_turns([([1], [60])], 8)]
    assert short.clean == []
    assert [weight for *_, weight in short.masked] == [0, 1, 1, 1, *[rest] * 4]


@pytest.mark.parametrize("block_length", [2, 4, 8])
def test_a_row_s_texts_are_those_that_are_decoded(block_length):
    """Each copy, unmasked, goes on where the clean stream before its block ends."""
    streams = sdar_data.make_batch(3, 1, block_length)
    assert streams.inputs.numel() == sdar_data.BATCH_TOKENS
    masked = streams.inputs == tokenizer.MASK_ID
    assert torch.equal(masked, streams.weights > 0)
    assert torch.equal(streams.inputs[~masked], streams.targets[~masked])
    answers = 0
    for row in range(4):
        for text in range(int(streams.texts[row].max()) + 1):
            here = streams.texts[row] == text
            clean = here & (streams.copies[row] < 0)
            length = int(clean.sum())
            assert streams.positions[row][clean].tolist() == list(range(length))
            assert length % block_length == 0
            before = streams.targets[row][clean].tolist()
            for copy in range(int(streams.copies[row][here].max()) + 1):
                own = here & (streams.copies[row] == copy)
                places = streams.positions[row][own].tolist()
                ids = streams.targets[row][own].tolist()
                assert places == list(range(places[0], places[0] + len(ids)))
                assert places[0] % block_length == len(ids) % block_length == 0
                assert places[0] <= length
                question = tokenizer.decode(before[: places[0]] + ids)
                assert ids[-1] == EOS and "<unk>" not in question
                end = ids.index(EOS)
                # Up to its end the copy is the text, but for the way it ends.
                same = before[places[0] : places[0] + end]
                assert same == ids[: len(same)]
                answers += 1
    assert answers > 8


def test_masks_are_spread_evenly_and_count_alike():
    batches = [sdar_data.make_batch(step, 1, 8) for step in range(30)]
    # A mask counts 1 / p: in the mean a batch's weights sum to 1.
    sums = torch.stack([batch.weights.sum() for batch in batches])
    assert abs(sums.mean() - 1) < 0.05
    first, again = sdar_data.make_batch(5, 1, 8), sdar_data.make_batch(5, 1, 8)
    assert torch.equal(first.inputs, again.inputs)
    other = sdar_data.make_batch(5, 2, 8)
    same_shape = other.inputs.shape == first.inputs.shape
    assert not (same_shape and torch.equal(first.inputs, other.inputs))


def test_chats_have_several_turns_and_fit_into_their_rows():
    rng = random.Random(0)
    for length, most in zip(sdar_data.ROWS, sdar_data.MOST_TURNS, strict=True):
        rows = [sdar_data.fill_row(rng, length, 8, most) for _ in range(20)]
        assert all(sum(map(len, row)) <= length for row in rows)
        assert sum(sum(map(len, row)) for row in rows) > 0.75 * 20 * length
        turns = [text.masked[-1][2] + 1 for row in rows for text in row]
        assert min(turns) == 1 and most // 2 < max(turns) <= most


def test_the_stages_are_the_steps():
    steps = sdar_stages.stage_steps(sdar_tiny.STEPS)
    assert list(steps) == [2, 4, 8] and sum(steps.values()) == sdar_tiny.STEPS
    found = [sdar_stages.block_length_at(step, 90) for step in range(90)]
    counts = {length: found.count(length) for length in (2, 4, 8)}
    assert counts == sdar_stages.stage_steps(90) and found == sorted(found)


@pytest.mark.slow
def test_training_exports_blocks_of_eight(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    from vllm_dlm.training.block_causal import load_block_causal

    monkeypatch.setattr(sdar_data, "BATCH_TOKENS", 512)
    monkeypatch.setattr(sdar_tiny, "NUM_PROGRESS_PROBLEMS", 2)
    options = LoopOptions(steps=2, compile_model=False)
    assert sdar_tiny.train(tmp_path, options)
    model = load_block_causal(tmp_path)
    assert model.attention_block == 8
    sizes = model.shape.num_parameters / 1e6
    assert 1.0 < sizes < 1.2


def test_the_plain_decoder_is_a_loop_over_blocks():
    from vllm_dlm.training.block_causal import load_block_causal
    from vllm_dlm.training.tiny.sdar_evaluation import decode_blocks

    model = load_block_causal(resolve("sdar-tiny"))
    problems = sample_problems(3, 4, "heldout")
    prompts = [
        tokenizer.encode_prompt(problem.question, index % 2 == 0)
        for index, problem in enumerate(problems)
    ]
    found = decode_blocks(model, prompts, canvas=30)
    for prompt, row in zip(prompts, found, strict=True):
        ids = prompt + [tokenizer.MASK_ID] * 30
        first = len(prompt) // 8 * 8
        while first < len(ids) and EOS not in ids[len(prompt) : first]:
            end = min(first + 8, len(ids))
            while tokenizer.MASK_ID in ids[first:end]:
                with torch.no_grad():
                    scores = model(torch.tensor([ids[:end]]))[0, first:]
                scores[:, tokenizer.MASK_ID] = float("-inf")
                best, tokens = scores.softmax(-1).max(-1)
                masks = [
                    ids[first + i] == tokenizer.MASK_ID for i in range(end - first)
                ]
                place = int(best.masked_fill(~torch.tensor(masks), -1).argmax())
                ids[first + place] = int(tokens[place])
            first += 8
        assert row == ids[len(prompt) :]


@pytest.mark.slow  # Of weights that do not change.
def test_the_shipped_model_answers():
    from vllm_dlm.training.block_causal import load_block_causal
    from vllm_dlm.training.tiny.sdar_evaluation import evaluate_model

    model = load_block_causal(resolve("sdar-tiny"))
    assert evaluate_model(model, 48, seed=7)["all"] > 0.85


@pytest.mark.slow
def test_the_engine_answers_as_the_plain_decoder_and_keeps_a_chat_s_keys():
    from vllm_dlm.entrypoints.llm import LLM
    from vllm_dlm.training.block_causal import load_block_causal
    from vllm_dlm.training.tiny.sdar_evaluation import evaluate_model
    from vllm_dlm.training.tiny.sdar_served import answer_chats, answer_questions

    llm = LLM("sdar-tiny", block_size=32, max_num_seqs=32, enforce_eager=True)
    try:
        static = answer_questions(llm, {"strategy": "static"}, 12, 3, 32)
        model = load_block_causal(resolve("sdar-tiny"))
        for task in TASKS:
            plain = evaluate_model(model, 12, canvas=32, seed=3, tasks=[task])
            # Ties in the roundings aside.
            assert abs(static.right[task] - plain["all"]) < 0.1
        assert sum(static.right.values()) / len(TASKS) > 0.85
        quick = answer_questions(llm, {"strategy": "threshold"}, 12, 3, 32)
        assert sum(quick.right.values()) / len(TASKS) > 0.85
        assert quick.forwards < 0.7 * static.forwards
        turns = answer_chats(llm, {"strategy": "threshold"}, 24, 5, 3, 32)
        assert turns[0].cached < 0.1 < 0.5 < turns[-1].cached
        assert all(turn.right > 0.75 for turn in turns)
    finally:
        llm.llm_engine.engine_core.shutdown()
