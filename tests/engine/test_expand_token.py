# SPDX-License-Identifier: Apache-2.0
"""DreamOn's token that asks for two masks is no text: it is never written.

Here it is the token that the random model writes most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from engine.cases import make_prompt
from engine.harness import Engine, params

SUFFIX = [5, 6, 7]
OPTIONS = [
    params(24, dlm={"strategy": "threshold", "suffix": SUFFIX}),
    params(24, dlm={"strategy": "static", "steps": 3, "suffix": SUFFIX}),
    params(24, dlm={"strategy": "credit", "block_length": 8}),
    params(24, dlm={"strategy": "klass"}, temperature=1.0, seed=4),
    params(24, dlm={"strategy": "threshold"}, ignore_eos=True, logprobs=2),
]
PROMPTS = [make_prompt(3 + number, number) for number in range(len(OPTIONS))]


def test_it_is_never_written(engine: Engine, engines: Callable[..., Engine]):
    before = Counter(
        token for one in engine.run(PROMPTS, OPTIONS) for token in one.tokens
    )
    special = {engine.llm.get_tokenizer().eos_token_id}
    expand = next(t for t, _ in before.most_common() if t not in special)
    assert before[expand] > 5
    without = engines(hf_overrides={"expand_token_id": expand})
    together = without.run(PROMPTS, OPTIONS)
    for prompt, option, one in zip(PROMPTS, OPTIONS, together, strict=True):
        assert one.tokens and expand not in one.tokens
        # What a request may say itself has the same effect.
        assert without.run([prompt], option) == [one]
    option = OPTIONS[0].clone()
    option._bad_words_token_ids = [[expand]]
    assert engine.run(PROMPTS[:1], option) == together[:1]
