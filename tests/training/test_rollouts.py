# SPDX-License-Identifier: Apache-2.0
"""Roll-outs in the trainer: what they record, how they draw, when they end."""

from __future__ import annotations

import pytest
from tiers import fast

torch = pytest.importorskip("torch")

from vllm_dlm.training.reinforcement.rollout_rows import RollOuts  # noqa: E402
from vllm_dlm.training.reinforcement.rollouts import (  # noqa: E402
    DECODERS,
    Decoder,
    roll_out,
)
from vllm_dlm.training.tiny.llada_evaluation import fill_masks  # noqa: E402
from vllm_dlm.training.tiny.llada_modeling import (  # noqa: E402
    LLaDAModel,
    LLaDAShape,
)

MASK, END, V = 2, 0, 64
PROMPTS = [[5, 6, 7], [9] * 11, [4, 30, 31, 32, 33, 8]]
SHAPE = LLaDAShape(V, d_model=32, n_layers=2, n_heads=2, mlp_hidden_size=48)


@pytest.fixture(scope="module")
def network() -> LLaDAModel:
    torch.manual_seed(3)
    return LLaDAModel(SHAPE).eval()


def rolled(network: LLaDAModel, decoder: Decoder, prompts=PROMPTS, **options):
    def logits_at(ids, valid, where):
        return network(ids, valid)[where]

    options = {"canvas": 16, "seeds": range(len(prompts)), "end_id": END} | options
    return roll_out(logits_at, prompts, decoder=decoder, mask_id=MASK, **options)


def check_record(network: LLaDAModel, rollouts: RollOuts, decoder: Decoder) -> None:
    """Steps, log-probabilities and canvases belong together, by a forward a step."""
    for step in range(rollouts.num_steps):
        canvas, written = rollouts.canvas(step), rollouts.written(step)
        assert (canvas[written] == MASK).all()
        for row in range(len(canvas)):
            end = int(rollouts.valid[row].sum())
            logits = network(canvas[row : row + 1, :end])[0].double()
            logits[:, MASK] = -torch.inf
            logprobs = logits.log_softmax(-1)
            for place in written[row].nonzero()[:, 0].tolist():
                token = rollouts.ids[row, place]
                found = rollouts.logprobs[row, place].item()
                assert found == pytest.approx(logprobs[place, token].item(), abs=1e-4)
                if decoder.temperature == 0:
                    assert token == logprobs[place].argmax()


@pytest.mark.parametrize("temperature", fast(1.0, of=(0.0, 1.0)))
@pytest.mark.parametrize("name", DECODERS)
def test_every_position_is_written_once(network, name: str, temperature: float):
    scheduled = name in ("static", "eoser")
    decoder = Decoder(
        name, temperature=temperature, tokens_per_step=3 if scheduled else None
    )
    found = rolled(network, decoder, canvas=10)
    assert torch.equal(found.steps >= 0, found.response)
    assert not (found.ids[found.response] == MASK).any()
    assert found.response.sum(1).tolist() == [10] * 3
    sizes = [int(found.written(s)[0].sum()) for s in range(found.num_steps)]
    if scheduled:
        assert sizes == [3, 3, 2, 2]
    elif "ass" in name:
        assert sizes == [1, 2, 7]
    check_record(network, found, decoder)


def test_static_is_the_evaluation_s_decoder(network: LLaDAModel):
    found = rolled(network, Decoder("static", block_length=8, tokens_per_step=2))
    rows = [(prompt, [MASK] * 16) for prompt in PROMPTS]
    wanted = fill_masks(
        network, rows, mask_id=MASK, eos_id=None, block_length=8, tokens_per_step=2
    )
    for ids, response, canvas in zip(found.ids, found.response, wanted, strict=True):
        assert ids[response].tolist() == canvas
    blocks = found.steps[found.response].view(3, 2, 8)
    assert blocks[:, 0].max() == 3 and blocks[:, 1].min() == 4


def test_a_row_depends_on_its_own_seed_alone(network: LLaDAModel):
    decoder = Decoder("static", tokens_per_step=4, temperature=1.0)
    together = rolled(network, decoder, seeds=[5, 6, 5])
    alone = rolled(network, decoder, prompts=PROMPTS[1:2], seeds=[6])
    assert together.answers(END)[1:2] == alone.answers(END)
    assert torch.equal(together.steps[1][together.valid[1]], alone.steps[0])
    other = rolled(network, decoder, prompts=PROMPTS[1:2], seeds=[7])
    assert not torch.equal(other.ids, alone.ids)


def test_draws_follow_the_tempered_distribution():
    """Confidence stays untempered: the recorded log-probability is the model's."""
    logits = torch.tensor([[0.0, 1.0, 5.0, -1.0]])

    def logits_at(ids, valid, where):
        return logits.expand(int(where.sum()), 4)

    decoder = Decoder("static", tokens_per_step=8, temperature=0.5)
    found = roll_out(
        logits_at,
        [[1]] * 200,
        canvas=8,
        decoder=decoder,
        mask_id=MASK,
        end_id=9,
        seeds=range(200),
    )
    drawn = found.ids[found.response]
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    wanted = (torch.tensor([0.0, 1.0, -torch.inf, -1.0]) / 0.5).softmax(0)
    torch.testing.assert_close(shares, wanted, atol=0.03, rtol=0)
    plain = torch.tensor([0.0, 1.0, -torch.inf, -1.0]).log_softmax(0)
    torch.testing.assert_close(found.logprobs[found.response], plain[drawn])
    entropy = torch.special.entr(plain.exp()).sum()
    torch.testing.assert_close(found.first_entropy, entropy.expand(200))


def test_a_text_that_has_ended(network: LLaDAModel):
    """With `stop_at_end` the steps are those that an engine does."""
    decoder = Decoder("threshold", {"threshold": 0.5})
    whole = rolled(network, decoder, canvas=12)
    # Tokens that it writes, in the place of the end of a text.
    for end in whole.ids[0, [4, 8]].tolist():
        cut = rolled(network, decoder, canvas=12, stop_at_end=True, end_id=end)
        assert whole.answers(end) == cut.answers(end)
        until = whole.to_end(end)[0]
        assert int(cut.steps[0].max()) == int(whole.steps[0, until].max())
        assert (cut.ids == MASK).any()


def test_block_causal_blocks_count_from_the_start():
    """A prompt of 5 tokens with blocks of 4: one position, then four and so on."""

    def logits_at(ids, valid, where):
        order = torch.arange(ids.shape[1]).expand(ids.shape)[where]
        return torch.stack([order * 0.01, 1 - order * 0.01, order * 0.0], 1)

    found = roll_out(
        logits_at,
        [[1] * 5, [1] * 8],
        canvas=6,
        decoder=Decoder("static", block_length=4),
        mask_id=2,
        end_id=9,
        seeds=[0, 1],
        attention_block=4,
    )
    # A row waits where another has a longer block, and its steps count on.
    assert found.steps[0, 5:11].tolist() == [0, 1, 2, 3, 4, 5]
    assert found.steps[1, 8:].tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="set block_length to 4"):
        roll_out(
            logits_at,
            [[1]],
            canvas=6,
            decoder=Decoder("static"),
            mask_id=2,
            end_id=9,
            seeds=[0],
            attention_block=4,
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "statik"}, "static"),
        ({"name": "ass", "tokens_per_step": 2}, "leave tokens_per_step out"),
        ({"name": "ass", "block_length": 8}, "leave block_length out"),
        ({"name": "static", "block_length": 0}, "block_length 0 is below 1"),
        ({"name": "static", "temperature": -1.0}, "below 0"),
        ({"name": "static", "params": {"mode": "none"}}, "mode"),
    ],
)
def test_a_decoder_that_cannot_be(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        Decoder(**options)


def test_a_decoder_that_reads_what_roll_outs_have_not(network: LLaDAModel):
    with pytest.raises(ValueError, match="uniform"):
        rolled(network, Decoder("static", {"mode": "random"}))


def test_options_of_a_request():
    decoder = Decoder("eoser-ass", {"last_weight": 0.9})
    assert decoder.options(32) == {
        "strategy": "eoser",
        "strategy_config": {"schedule": "doubling", "last_weight": 0.9},
        "block_length": "canvas",
    }
    decoder = Decoder("static", block_length=8, tokens_per_step=3)
    assert decoder.options(32) == {
        "strategy": "static",
        "block_length": 8,
        "steps_per_block": 3,
    }
