# SPDX-License-Identifier: Apache-2.0
"""RoPE scaling of every family, old layouts and new: as Transformers has it, or not."""

import pytest
import torch
from family_configs import CONFIGS, read, refusal
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

READ = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn with all": {
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.25,
        "truncate": False,
    },
    "yarn with mscale": {
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
    },
    "yarn of the config's length": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
OTHERS = {
    "dynamic": {"factor": 2.0},
    "longrope": {
        "short_factor": [1.0] * 64,
        "long_factor": [2.0] * 64,
        "original_max_position_embeddings": 64,
    },
    "su": {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64},
    "mrope": {"mrope_section": [16, 24, 24]},
    "proportional": {},
    "ntk": {"factor": 2.0},
    "deepseek_yarn": {"factor": 2.0, "original_max_position_embeddings": 64},
    "axial": {},
}


def layouts(kind, parameters, theta):
    """The same scaling as configs of several times have it."""
    yield {"rope_theta": theta, "rope_scaling": {"type": kind} | parameters}
    yield {"rope_theta": theta, "rope_scaling": {"rope_type": kind} | parameters}
    whole = {"rope_type": kind, "rope_theta": theta} | parameters
    yield {"rope_parameters": whole, "rope_scaling": None, "rope_theta": None}
    yield {
        "rope_parameters": {"full_attention": whole},
        "rope_scaling": None,
        "rope_theta": None,
    }


def of_transformers(config, positions):
    """cos and sin, [positions, rotated dimensions / 2] each."""
    parameters = config.rope_parameters
    head = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    if parameters["rope_type"] == "default":
        size = int(head * parameters.get("partial_rotary_factor", 1.0))
        steps = torch.arange(0, size, 2).float() / size
        inverse, gain = 1.0 / parameters["rope_theta"] ** steps, 1.0
    else:
        inverse, gain = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    angles = positions[:, None].float() * inverse
    return angles.cos() * gain, angles.sin() * gain


@pytest.fixture(scope="module", autouse=True)
def vllm_config():
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("family", CONFIGS)
def test_scalings_that_are_read(family, name):
    from vllm.model_executor.layers.rotary_embedding import get_rope

    kind, parameters, theta = name.split()[0], READ[name], 12345.0
    fields = {
        field: value
        for field, value in CONFIGS[family].items()
        if field not in ("rope_parameters", "max_sequence_length")
    } | {"max_position_embeddings": 256}
    seen = []
    for layout in layouts(kind, parameters, theta):
        config = read(fields | layout)
        head = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        rope = get_rope(
            head,
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
            dtype=torch.float32,
        )
        positions = torch.arange(256)
        wanted = torch.cat(of_transformers(config, positions), dim=-1)
        torch.testing.assert_close(
            rope.cos_sin_cache[:256].float(), wanted, atol=2e-5, rtol=0
        )
        seen.append(config.rope_parameters)
    assert all(one == seen[0] for one in seen)
    assert seen[0]["rope_theta"] == theta
    assert seen[0].get("partial_rotary_factor", 1.0) == (
        0.5 if family in ("llada2", "llada2_2") else 1.0
    )


@pytest.mark.parametrize("family", CONFIGS)
def test_other_scalings_are_refused(family):
    fields = {k: v for k, v in CONFIGS[family].items() if k != "rope_parameters"}
    for kind, parameters in OTHERS.items():
        for layout in layouts(kind, parameters, 1e4):
            text = refusal(fields | layout)
            assert repr(kind) in text
            assert "llama3" in text
    for layout in layouts("default", {"mrope_section": [16, 24, 24]}, 1e4):
        assert "mrope_section" in refusal(fields | layout)


@pytest.mark.parametrize("family", CONFIGS)
def test_incomplete_and_impossible_scalings(family):
    fields = {k: v for k, v in CONFIGS[family].items() if k != "rope_parameters"}
    for scaling, named in (
        ({"type": "linear"}, "factor"),
        ({"type": "llama3", "factor": 2.0}, "low_freq_factor"),
        ({"type": "yarn", "factor": "x"}, "factor"),
        ({"type": "yarn", "factor": 0}, "factor"),
        (
            {"type": "yarn", "factor": 2, "beta_fast": None, "beta_slow": []},
            "beta_slow",
        ),
        ({"type": "yarn", "factor": 2, "truncate": "x"}, "truncate"),
        ({"type": "linear", "rope_type": "yarn", "factor": 2}, "rope_type"),
        ({"type": 3}, "type"),
        ({"type": "linear", "factor": 2, "alpha": 3}, "alpha"),
        ({"sliding_attention": {}, "full_attention": {}}, "sliding_attention"),
        ("x", "rope_scaling"),
    ):
        assert named in refusal(fields | {"rope_scaling": scaling})
    both = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    text = refusal(fields | both | {"rope_parameters": {"factor": 3.0}})
    assert "rope_parameters and rope_scaling" in text


@pytest.mark.parametrize("family", CONFIGS)
def test_a_context_ends_where_yarn_does(family):
    fields = {
        field: value
        for field, value in CONFIGS[family].items()
        if field not in ("rope_parameters", "max_sequence_length")
    } | {"max_position_embeddings": 512}
    scaling = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}
    assert read(fields | {"rope_scaling": scaling}).max_position_embeddings == 256
