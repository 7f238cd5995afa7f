# SPDX-License-Identifier: Apache-2.0
"""Options in a model's folder: what a training writes there is how it is decoded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from engine.harness import Engine, params

OPTIONS = {
    "strategy": "static",
    "steps_per_block": 4,
    "block_length": 8,
}
PROMPT = [1, 20, 21, 22]


def with_options(checkpoint: Path, folder: Path, options: object) -> Path:
    """A copy of a model's folder with `dlm_options`."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dlm_options": options}))
    return folder


def test_the_folder_s_are_used_and_a_request_s_win(
    checkpoint: Path,
    tmp_path: Path,
    engines: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
):
    from vllm_dlm.training import weights
    from vllm_dlm.training.decoding import decode
    from vllm_dlm.training.learner import load_learner

    # As a training exports it, in shards.
    monkeypatch.setattr(weights, "SHARD_BYTES", 100_000)
    learner, folder = load_learner(checkpoint), tmp_path / "model"
    learner.save(folder, decoding=OPTIONS)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    engine = engines(model=str(folder))
    requests = {
        # Two blocks of eight positions.
        "the folder's": ({}, 2 * 4),
        "more steps": ({"steps_per_block": 8}, 2 * 8),
        "one block": ({"block_length": 16}, 4),
        "another strategy": ({"strategy": "threshold", "strategy_config": {}}, None),
    }
    found = engine.run(
        [PROMPT] * len(requests),
        [params(16, dlm=dlm, ignore_eos=True) for dlm, _ in requests.values()],
    )
    forwards = {
        name: (one.forwards, wanted)
        for (name, (_, wanted)), one in zip(requests.items(), found, strict=True)
    }
    *counted, other = forwards.values()
    assert all(ours == wanted for ours, wanted in counted), forwards
    # Its steps are by confidence: of this random model, one token each.
    assert other[0] != 8
    # The trainer decodes as this engine does.
    [ours] = decode(learner, [PROMPT], OPTIONS, 16)
    [served] = engine.run([PROMPT], params(16))
    assert tuple(ours) == (served.tokens, served.forwards)


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"strategy": "nonsense"}, ("nonsense", "threshold", "static")),
        ({"stategy": "static"}, ("stategy", "strategy", "steps_per_block")),
        (
            {"strategy": "threshold", "strategy_config": {"treshold": 0.5}},
            ("treshold", "threshold"),
        ),
        ({"strategy_config": {"threshold": 0.5}}, ("needs a strategy",)),
        ({"block_length": 0}, ("block_length", "1 to 1024")),
        ({"trajectory_dir": "/tmp"}, ("trajectory_dir", "steps_per_block")),
        ({"cache": "fast"}, ("cache", "dual")),
        (["static"], ("dlm_options", "object")),
    ],
)
def test_wrong_ones_are_refused_when_the_model_loads(
    checkpoint: Path, tmp_path: Path, options: object, fragments: tuple[str, ...]
):
    from vllm.engine.arg_utils import EngineArgs

    folder = with_options(checkpoint, tmp_path / "model", options)
    with pytest.raises(ValueError) as caught:
        EngineArgs(str(folder), dtype="float32").create_engine_config()
    message = str(caught.value)
    assert not [part for part in fragments if part not in message], message
    assert "config" in message
