# SPDX-License-Identifier: Apache-2.0
"""Whether two tokenizers mean the same by the same ids. No vLLM here."""

from __future__ import annotations


def refuse_other_tokens(
    tuned: str, ours: dict[str, int], base: str, theirs: dict[str, int]
) -> None:
    """Refuse models whose token ids mean different texts.

    Args:
        tuned: the tuned model.
        ours: its tokens.
        base: the base.
        theirs: its tokens.

    Raises:
        ValueError: it names a token.
    """
    tokens = ours.keys() | theirs.keys()
    different = sorted(each for each in tokens if ours.get(each) != theirs.get(each))
    if different:
        raise ValueError(
            f"{tuned!r} and its base {base!r} have different tokenizers: {len(ours)} "
            f"and {len(theirs)} tokens, {len(different)} of them not the same, such as "
            f"{different[0]!r}. Take the model that was tuned; if tuning added tokens, "
            "save the tuned model's tokenizer beside the base"
        )
