# SPDX-License-Identifier: Apache-2.0
"""How many characters a tree of a regular expression matches."""

from __future__ import annotations

from vllm_dlm.constraints.syntax import Characters, Choice, Concat, Node, Repeat


def lengths_of(node: Node) -> tuple[int, int | None]:
    """The fewest and the most characters; None for any number."""
    if isinstance(node, Characters):
        return 1, 1
    if isinstance(node, Choice):
        lengths = [lengths_of(branch) for branch in node.branches] or [(0, 0)]
        longest = [most for _, most in lengths]
        most = None if None in longest else max(each or 0 for each in longest)
        return min(least for least, _ in lengths), most
    if isinstance(node, Concat):
        lengths = [lengths_of(part) for part in node.parts]
        longest = [most for _, most in lengths]
        most = None if None in longest else sum(each or 0 for each in longest)
        return sum(least for least, _ in lengths), most
    least, most = lengths_of(node.part)
    longest_repeat = None if most is None or node.most is None else most * node.most
    return least * node.least, 0 if most == 0 else longest_repeat


def at_most(node: Node, least: int, most: int | None) -> Node:
    """A tree with lengths between two bounds, where a count says what they mean.

    That is where a part of one character is repeated and the rest has one length. Any
    other tree is returned as it is.
    """
    parts = node.parts if isinstance(node, Concat) else (node,)
    counted = [
        i
        for i, part in enumerate(parts)
        if isinstance(part, Repeat) and isinstance(part.part, Characters)
    ]
    others = [lengths_of(part) for i, part in enumerate(parts) if i not in counted]
    if len(counted) != 1 or any(low != high for low, high in others):
        return node
    fixed = sum(low for low, _ in others)
    part = parts[counted[0]]
    assert isinstance(part, Repeat)
    low, high = max(part.least, least - fixed), part.most
    if most is not None:
        high = most - fixed if high is None else min(high, most - fixed)
    if high is not None and low > high:
        return Choice(())
    new = Repeat(part.part, low, high)
    return Concat((*parts[: counted[0]], new, *parts[counted[0] + 1 :]))
