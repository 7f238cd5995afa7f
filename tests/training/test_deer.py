# SPDX-License-Identifier: Apache-2.0
"""Training of diffusion drafters: rows of both stages, acceptance, the command."""

import json
import random

import pytest
from tiers import fast

from vllm_dlm.tasks import tokenizer
from vllm_dlm.training.drafters.acceptance import measure_acceptance
from vllm_dlm.training.drafters.deer_data import (
    Recipe,
    make_batch,
    stage_one_row,
    stage_two_row,
)
from vllm_dlm.training.drafters.teacher import Answered
from vllm_dlm.training.loop import LoopOptions

torch = pytest.importorskip("torch")

MASK, END = tokenizer.MASK_ID, tokenizer.EOS_ID
RECIPE = Recipe(mask_id=MASK, end_id=END, stage_one_steps=10, block_length=8)
PROMPT, ANSWER = [1, 11, 12], [21, 22, 23, 24, END]
UNFINISHED = [21, 22, 23, 24]
ROWS = [(PROMPT, ANSWER), (PROMPT, UNFINISHED), ([1], [31, END])]
ANSWERED = Answered([row[0] for row in ROWS], [row[1] for row in ROWS])


@pytest.mark.parametrize("make_row", [stage_one_row, stage_two_row])
@pytest.mark.parametrize(("prompt", "answer"), ROWS)
def test_rows_continue_the_text(make_row, prompt, answer):
    rng = random.Random(0)
    cuts, widths = set(), set()
    for _ in range(300):
        row = make_row(rng, prompt, answer, RECIPE)
        cut = len(row.text) - len(prompt)
        cuts.add(cut)
        widths.add(len(row.rest))
        assert row.text == prompt + answer[:cut]
        # Behind an end there are ends; behind an answer that was cut, nothing.
        known = answer[cut:] + [END] * (8 if answer[-1] == END else 0)
        assert row.rest == known[: len(row.rest)]
        assert len(row.rest) == len(row.weights) <= 8
    assert cuts == set(range(len(answer)))
    assert max(widths) == (8 if answer[-1] == END else len(answer))


def test_stage_one_weights():
    rng = random.Random(1)
    rows = [stage_one_row(rng, PROMPT, ANSWER, RECIPE) for _ in range(4000)]
    whole = [row for row in rows if all(row.weights)]
    assert 0.5 < len(whole) / len(rows) < 0.75
    for row in rows:
        answered = len(ANSWER) - (len(row.text) - len(PROMPT))
        near = {weight for weight in row.weights[:answered] if weight}
        far = {weight for weight in row.weights[answered:] if weight}
        assert len(near) <= 1 and len(far) <= 1
        assert all(1 <= weight <= 10 for weight in near)
        if near and far:
            assert far.pop() == pytest.approx(0.05 * near.pop())
    # A token's weight is 1 on average, whatever the ratio of masks.
    first = sum(row.weights[0] for row in rows) / len(rows)
    assert first == pytest.approx(1.0, abs=0.06)


def test_stage_two_weights():
    rng = random.Random(2)
    seen = set()
    for _ in range(100):
        row = stage_two_row(rng, PROMPT, ANSWER, RECIPE)
        refined = len(ANSWER) - (len(row.text) - len(PROMPT))
        seen.add(refined)
        if refined == 4:
            assert row.weights[:4] == pytest.approx([1.030301, 1.0201, 1.01, 1.0])
        assert row.weights[refined - 1] == 1.0
        assert set(row.weights[refined:]) <= {0.05}
    assert seen == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("step", [0, 10])
def test_batches(step):
    ids, inputs, valid, weights = make_batch(ANSWERED, step, 1, RECIPE, rows=40)
    again = make_batch(ANSWERED, step, 1, RECIPE, rows=40)
    assert all(map(torch.equal, (ids, inputs, valid, weights), again))
    assert not torch.equal(make_batch(ANSWERED, step, 2, RECIPE, rows=40)[0], ids)
    masked = inputs == MASK
    assert torch.equal(masked, weights > 0)
    assert torch.equal(ids[~masked], inputs[~masked])
    assert not (masked & ~valid).any()
    assert (ids[~valid] == END).all()


def test_acceptance_is_counted_as_a_target_would():
    answered = Answered([[1], [2]], [[5, 6, 7, 8, 9], [5, END]])

    def always(*tokens):
        return lambda prefixes: [list(tokens) for _ in prefixes]

    # After the first token, 6 7 agree and 9 does not: 8 is the target's, 9 is left.
    result = measure_acceptance(always(6, 7, 9), answered)
    assert (result.rounds, result.drafted, result.accepted) == (3, 5, 2)
    assert result.tokens == 7
    assert result.tokens_per_forward == pytest.approx(7 / 5)
    assert result.accepted_per_round == pytest.approx(2 / 3)
    assert result.share_accepted == pytest.approx(2 / 5)

    def perfect(prefixes):
        rest = {1: [6, 7, 8, 9, 3, 3], 2: [END]}
        return [rest[prefix[0]] for prefix in prefixes]

    result = measure_acceptance(perfect, answered)
    assert (result.rounds, result.drafted, result.accepted) == (2, 5, 5)
    nothing = measure_acceptance(always(), answered)
    assert (nothing.rounds, nothing.drafted, nothing.tokens_per_forward) == (5, 0, 1)


def options(steps):
    return LoopOptions(steps=steps, compile_model=False, eval_steps=steps)


@pytest.mark.slow
def test_a_fresh_drafter_learns_and_loads(tmp_path):
    from training.drafter_losses import losses

    from vllm_dlm.training.drafters import deer

    assert deer.train(tmp_path, options(6), num_prompts=60, max_tokens=24)
    kept = json.loads((tmp_path / "answers.json").read_text())
    assert len(kept["answers"]) == 60
    assert all(row[-1] == END for row in kept["answers"])
    assert all(END not in row[:-1] for row in kept["answers"])
    before, after = losses(tmp_path)
    assert after < before - 0.3
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dlm_draft_length"] == 32


@pytest.mark.parametrize(
    "drafter", fast("deer-tiny-block", of=("llada-tiny", "deer-tiny-block"))
)
def test_an_existing_drafter_goes_on(tmp_path, drafter):
    from safetensors.torch import load_file

    from vllm_dlm.config.aliases import resolve
    from vllm_dlm.training.drafters import deer

    assert deer.train(
        tmp_path, options(2), drafter=drafter, num_prompts=8, max_tokens=12
    )
    source = resolve(drafter)
    for name in ("tokenizer.json", "chat_template.jinja"):
        with open(f"{source}/{name}") as file:
            assert (tmp_path / name).read_text() == file.read()
    with open(f"{source}/config.json") as file:
        wanted = json.load(file) | {"dlm_draft_length": 32}
    assert json.loads((tmp_path / "config.json").read_text()) == wanted
    old = load_file(f"{source}/model.safetensors")
    new = load_file(tmp_path / "model.safetensors")
    assert old.keys() == new.keys()
    changes = [(old[name] - new[name]).abs().max().item() for name in old]
    assert all(0 < change < 0.1 for change in changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "llada-tiny"}, "is not an autoregressive model"),
        ({"drafter": "llama-tiny-draft"}, "is a 'llama'"),
        ({"drafter": "no-such-folder"}, "there is no no-such-folder"),
        ({"attention_block": 0}, "a block has at least 1 token, not 0"),
        ({"attention_block": 4, "drafter": "deer-tiny"}, "is for a fresh drafter"),
        ({"alpha": 0.9}, "alpha must be at least 1"),
        ({"block_length": 0}, "block_length must be above 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"prompts": "missing.txt"}, "cannot read the prompts missing.txt"),
    ],
)
def test_refusals(tmp_path, arguments, message):
    from vllm_dlm.training.drafters import deer

    with pytest.raises(ValueError, match=message):
        deer.train(tmp_path, options(1), num_prompts=4, **arguments)


def test_another_networks_checkpoint_is_refused(tmp_path):
    from vllm_dlm.training.drafters import deer

    sizes = {"num_prompts": 4, "max_tokens": 8, "block_length": 4}
    deer.train(tmp_path, options(1), **sizes)
    with pytest.raises(ValueError, match=r"training.pt is of another network.*--no-re"):
        deer.train(tmp_path, options(1), attention_block=4, **sizes)


@pytest.mark.parametrize(
    "name", ["deer", "llama-tiny-draft", "llada-tiny", "llada-forms", "sdar-tiny"]
)
def test_the_command_refuses_before_it_trains(tmp_path, capsys, name):
    from vllm_dlm.cli.command import main

    command = ["train", name, "--output-dir", str(tmp_path)]
    with pytest.raises(SystemExit):
        main([*command, "--num-problems", "0"])
    assert "'0' is not a whole number >= 1" in capsys.readouterr().err
    assert main([*command, "--skip-training"]) == 2
    assert "has no training.pt" in capsys.readouterr().err


def test_another_vocabulary_is_refused(tmp_path):
    from vllm_dlm.training.drafters.teacher import check_same_vocabulary

    tokenizer.save_tokenizer(tmp_path)
    check_same_vocabulary("llama-tiny", str(tmp_path))
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace('"Ada"', '"Adele"'))
    with pytest.raises(ValueError, match="have different vocabularies"):
        check_same_vocabulary("llama-tiny", str(tmp_path))


def test_prompts_of_a_file(tmp_path):
    from vllm_dlm.training.drafters.teacher import load_prompts, load_tokenizer

    of_target = load_tokenizer("llama-tiny")
    expected = tokenizer.encode_prompt("Copy [Ada, Ben]", chat=False)
    text = tmp_path / "prompts.txt"
    text.write_text("Copy [Ada, Ben]\n\n")
    assert load_prompts(text, of_target, 9, 0) == [expected]
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": "Copy [Ada, Ben]"}\n')
    assert load_prompts(rows, of_target, 9, 0) == [expected]
    rows.write_text('{"text": "Copy"}\n')
    with pytest.raises(ValueError, match='line 1: expected an object with the key "pr'):
        load_prompts(rows, of_target, 9, 0)
    text.write_text("\n")
    with pytest.raises(ValueError, match="has no prompt"):
        load_prompts(text, of_target, 9, 0)
    assert load_prompts(None, of_target, 3, 0) != load_prompts(None, of_target, 3, 1)


@pytest.mark.slow  # Of weights that do not change.
@pytest.mark.parametrize("name", ["deer-tiny", "deer-tiny-block"])
def test_the_shipped_drafters_are_accepted(name):
    """In one step they draft more than one forward of the draft model could."""
    from vllm_dlm.tasks.problems import sample_problems
    from vllm_dlm.training.drafters.networks import load_drafter
    from vllm_dlm.training.drafters.teacher import generate_answers, load_causal_lm

    prompts = [
        tokenizer.encode_prompt(problem.question, chat=index % 2 == 0)
        for index, problem in enumerate(sample_problems(44, 79, "heldout"))
    ]
    target = load_causal_lm("llama-tiny")
    answered = generate_answers(target, prompts, max_tokens=24)
    drafter = load_drafter(name)
    results = {
        width: measure_acceptance(
            lambda prefixes, width=width: drafter.draft(prefixes, width), answered
        )
        for width in (32, 8)
    }
    assert results[32].accepted_per_round > 3
    assert results[8].accepted_per_round > 2
    assert results[32].tokens_per_forward > 2.5
