# SPDX-License-Identifier: Apache-2.0
"""The order of the slow tests, and what is said of those that were not reached."""

import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from slow_order import order, thirds, unreached

TESTS = Path(__file__).parent

FILES = st.lists(st.integers(1, 40), max_size=20).map(
    lambda counts: [f"{i}.py" for i, count in enumerate(counts) for _ in range(count)]
)


@given(files=FILES, number=st.integers(0, 10**6))
def test_three_runs_begin_with_all_tests(files, number):
    parts = thirds(files)
    assert [file for part in parts for file in part] == list(dict.fromkeys(files))
    begun = set()
    for run in range(number, number + 3):
        files_of_run = order(files, run)
        assert sorted(files_of_run) == sorted(set(files))
        own = parts[run % 3]
        assert files_of_run[: len(own)] == own
        begun.update(own)
    assert begun == set(files)


def test_thirds_have_about_as_many_tests():
    files = [f"{i:02}" for i in range(30) for _ in range(i)]
    sizes = [sum(files.count(file) for file in part) for part in thirds(files)]
    assert all(abs(size - len(files) / 3) < 30 for size in sizes)


def test_what_was_not_reached_is_named():
    tests = [("a.py", "a1"), ("a.py", "a2"), ("b.py", "b1"), ("c.py", "c1")]
    assert unreached(tests, {"a1", "c1"}) == ["a.py (1 of 2)", "b.py (1 of 1)"]
    assert unreached(tests, {"a1", "a2", "b1", "c1"}) == []


def test_a_run_begins_with_its_third_and_names_the_rest(tmp_path):
    """A failure ends it, as `.ci/run` has it, and shows."""
    folder = tmp_path / "tests"
    folder.mkdir()
    for name in ("conftest.py", "slow_order.py"):
        (folder / name).symlink_to(TESTS / name)
    for i in range(3):
        (folder / f"test_{i}.py").write_text(
            "def test_first(): pass\n"
            f"def test_second(): assert {i} != 2, 'it is the third file'\n"
        )
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = tests\n")
    report = tmp_path / "unreached"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "--exitfirst", "-p", "no:cacheprovider",
         "--import-mode=importlib", "tests"],
        cwd=tmp_path,
        env={
            "PATH": "/usr/bin:/bin",
            "SLOW_TESTS_RUN": "7",
            "SLOW_TESTS_UNREACHED": str(report),
        },
        capture_output=True,
        text=True,
    )  # fmt: skip
    passed = [line for line in done.stdout.splitlines() if "PASSED" in line]
    assert [line.split()[0] for line in passed] == [
        "tests/test_1.py::test_first",
        "tests/test_1.py::test_second",
        "tests/test_2.py::test_first",
    ]
    assert done.returncode == 1 and "it is the third file" in done.stdout
    assert report.read_text() == "tests/test_0.py (2 of 2)\n"
