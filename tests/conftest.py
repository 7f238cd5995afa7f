# SPDX-License-Identifier: Apache-2.0
"""Settings and marks for all tests. Nothing heavy is imported until a test needs it."""

import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# vLLM reads these when it is imported: an engine in this process, a small KV cache,
# no network, no usage report. What the caller has set already stays.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# numba's pool, which vLLM's n-gram drafting starts, sets PyTorch's number of threads
# for good: one for each core, and they spin between two operations.
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    # One of several processes: idle threads that spin would take the others' cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import slow_order
from hypothesis import HealthCheck, settings

# No limits of time: on shared cores they say nothing. CI repeats the same examples
# every time, so that it fails only for what a change did. 8 of them: an example here
# is a whole block of several rows; `--hypothesis-profile=vllm-dlm-thorough` tries 500.
settings.register_profile(
    "vllm-dlm",
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,
)
settings.register_profile(
    "vllm-dlm-thorough", settings.get_profile("vllm-dlm"), max_examples=500
)
settings.load_profile("vllm-dlm")

GPUS_NEEDED = {"gpu": 1, "multi_gpu": 2}


@pytest.fixture(autouse=True, scope="module")
def environment_as_before() -> Iterator[None]:
    """A command in this process sets variables for itself, not for the next module."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() | before.keys():
        if name == "PYTEST_CURRENT_TEST":  # pytest's own, of this moment
            continue
        if name not in before:
            del os.environ[name]
        elif os.environ.get(name) != before[name]:
            os.environ[name] = before[name]


@pytest.fixture(autouse=True)
def log_reaches_caplog() -> None:
    """Also where an engine has configured vLLM's logger, whose child ours is."""
    logging.getLogger("vllm").propagate = True


@pytest.fixture
def no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A config that is refused is refused at once; vLLM reads it again after 2 s."""
    from vllm.transformers_utils import config

    monkeypatch.setattr(config, "with_retry", lambda call, *args, **options: call())


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's: unknown with `-p no:xdist`
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Several processes (`make test`) take files of tests as `dealing` says."""
    import dealing
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self._folders: dict[Any, str] = {}  # of each process

        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("::")[0]

        def _assign_work_unit(self, node: Any) -> None:
            others = {folder for one, folder in self._folders.items() if one != node}
            file = dealing.next_file(self.workqueue, self._folders.get(node), others)
            self._folders[node] = dealing.folder_of(file)
            self.workqueue.move_to_end(file, last=False)
            super()._assign_work_unit(node)

    return ByFile(config, log)


def pytest_collection_finish() -> None:
    """What is imported by now stays, and no garbage collection looks at it again.

    vLLM collects whenever an engine starts or ends, a second each without this.
    """
    gc.collect()
    gc.freeze()
    _inspect_models_in_this_process()


def _inspect_models_in_this_process() -> None:
    """vLLM looks at each class of models in a new process, which imports all of vLLM.

    It does so once on a machine, for each class, so as not to initialize CUDA.
    """
    registry: Any = sys.modules.get("vllm.model_executor.models.registry")
    if registry is not None:
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            registry._run_in_subprocess = lambda inspect: inspect()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Engines share this process, and vLLM ends the groups of all with any of them.

    By now a test's fixtures have started the engines that it shares with others.
    """
    core = sys.modules.get("vllm.v1.engine.core")
    if core is not None and hasattr(core, "cleanup_dist_env_and_memory"):
        # Looked up when it is called: `engine.harness.end` has it collect nothing.
        core.cleanup_dist_env_and_memory = lambda: gc.collect()  # type: ignore[attr-defined]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _skip_without_gpus(items)


def _skip_without_gpus(items: list[pytest.Item]) -> None:
    marked = [item for item in items if any(map(item.get_closest_marker, GPUS_NEEDED))]
    if not marked:
        return
    import torch

    present = torch.cuda.device_count()
    for item in marked:
        needed = max(n for m, n in GPUS_NEEDED.items() if item.get_closest_marker(m))
        if present < needed:
            reason = f"needs {needed} CUDA GPU(s), this machine has {present}"
            item.add_marker(pytest.mark.skip(reason=reason))


def _file_of(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


class SlowTests:
    """Where time may not suffice for all: their order, and which were not reached.

    Args:
        run: number of the run.
        report: file that names what was not reached, right at any time.
    """

    def __init__(self, run: int, report: Path) -> None:
        self._run = run
        self._report = report
        self._tests: list[tuple[str, str]] = []
        self._reached: set[str] = set()

    @pytest.hookimpl(trylast=True)  # what is not chosen has gone by then
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        files = slow_order.order([_file_of(item) for item in items], self._run)
        place = {file: i for i, file in enumerate(files)}
        items.sort(key=lambda item: place[_file_of(item)])

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._tests = [(_file_of(item), item.nodeid) for item in session.items]
        self._write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # At its end, which an interrupted test does not come to.
        if report.when == "teardown":
            self._reached.add(report.nodeid)
            self._write()

    def _write(self) -> None:
        lines = slow_order.unreached(self._tests, self._reached)
        self._report.write_text("".join(f"{line}\n" for line in lines))


def pytest_configure(config: pytest.Config) -> None:
    if "SLOW_TESTS_RUN" in os.environ:
        run = int(os.environ["SLOW_TESTS_RUN"])
        report = Path(os.environ["SLOW_TESTS_UNREACHED"])
        config.pluginmanager.register(SlowTests(run, report), "slow_tests")
