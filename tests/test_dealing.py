# SPDX-License-Identifier: Apache-2.0
"""Who runs which file of tests where several processes share them."""

from pathlib import Path

from dealing import COSTLY, folder_of, next_file
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]

FILES = st.lists(
    st.tuples(
        st.sampled_from(["engine", "server", "config", "files"]), st.integers(0, 9)
    ),
    min_size=1,
    unique=True,
).map(lambda names: [f"tests/{folder}/test_{number}.py" for folder, number in names])


@given(files=FILES, turns=st.lists(st.integers(0, 2), max_size=40))
def test_every_file_is_dealt_out_once_and_what_is_costly_first(files, turns):
    waiting = set(files)
    folders: dict[int, str] = {}
    for process in turns:
        if not waiting:
            break
        mine = folders.get(process)
        others = {folders[i] for i in folders if i != process}
        file = next_file(waiting, mine, others)
        there = {folder_of(one) for one in waiting}
        costly = there.intersection(COSTLY)
        assert file in waiting
        # In its folder while there are files; then what is costly, rather alone.
        if mine in there:
            assert folder_of(file) == mine
        elif costly:
            assert folder_of(file) in (costly - others or costly)
        else:
            assert folder_of(file) in (there - others or there)
        waiting.remove(file)
        folders[process] = folder_of(file)


def test_costly_folders_come_first_and_help_begins_at_the_end():
    engine, bench = (
        [f"tests/{name}/test_{i}.py" for i in "ab"] for name in ("engine", "bench")
    )
    files = ["tests/config/test_c.py", *bench, *engine, "tests/server/test_d.py"]
    assert next_file(files, None, set()) == engine[0]
    assert next_file(files, None, {"tests/engine"}) == "tests/server/test_d.py"
    assert next_file(files, "tests/bench", {"tests/engine"}) == bench[0]
    left = [files[0], engine[1]]
    assert next_file(left, "tests/bench", {"tests/engine"}) == engine[1]
    left = [files[0], *engine]
    assert next_file(left, "tests/bench", {"tests/engine"}) == engine[1]
    assert next_file(files[:1], "tests/bench", {"tests/config"}) == files[0]


def test_costly_folders_exist():
    assert [name for name in COSTLY if not (ROOT / name).is_dir()] == []
