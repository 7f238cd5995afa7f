# SPDX-License-Identifier: Apache-2.0
"""Who runs which file of tests where several processes share them."""

from pathlib import Path

from dealing import COSTLY, folder_of, next_file
from hypothesis import given
from hypothesis import strategies as st

TESTS = Path(__file__).parent

FILES = st.lists(
    st.tuples(st.sampled_from(["engine", "server", "kernels", ""]), st.integers(0, 9)),
    min_size=1,
    unique=True,
).map(lambda names: [f"tests/{folder}/test_{number}.py" for folder, number in names])


@given(files=FILES, turns=st.lists(st.integers(0, 2), max_size=40))
def test_every_file_is_dealt_out_once_and_folders_are_left_when_done(files, turns):
    waiting = set(files)
    folders: dict[int, str] = {}
    for process in turns:
        if not waiting:
            break
        mine = folders.get(process)
        others = {folders[i] for i in folders if i != process}
        file = next_file(waiting, mine, others)
        there = {folder_of(one) for one in waiting}
        assert file in waiting
        # In its folder while there are files; then where nobody is, if there is such.
        if mine in there:
            assert folder_of(file) == mine
        elif there - others:
            assert folder_of(file) not in others
        waiting.remove(file)
        folders[process] = folder_of(file)


def test_folders_with_engines_come_first_and_help_begins_at_the_end():
    files = [f"tests/{name}/test_{i}.py" for name in ("bench", "engine") for i in "ab"]
    files += ["tests/test_c.py", "tests/server/test_d.py"]
    assert next_file(files, None, set()) == "tests/engine/test_a.py"
    assert next_file(files, None, {"tests/engine"}) == "tests/server/test_d.py"
    assert next_file(files, "tests/bench", {"tests/engine"}) == "tests/bench/test_a.py"
    left = files[2:4]
    assert next_file(left, "tests", {"tests/engine"}) == "tests/engine/test_b.py"


def test_costly_folders_exist():
    assert [name for name in COSTLY if not (TESTS / name).is_dir()] == []
