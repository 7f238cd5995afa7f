# SPDX-License-Identifier: Apache-2.0
"""Options: merged in the right order, wrong ones refused with a helpful text."""

import pickle
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
from pydantic import Field

from vllm_dlm.admission.options import refuse_unread_options
from vllm_dlm.config.cache import Vicinity, Window
from vllm_dlm.config.model import DEFAULT_MAX_CANVAS, ModelDefaults
from vllm_dlm.config.options import (
    REQUEST_OPTIONS,
    SERVER_PARAMETER,
    DlmConfig,
    served_config,
)
from vllm_dlm.config.request import resolve, server_config
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import Params, Strategy

DEFAULTS = ModelDefaults("threshold", 32, mask_token_id=9)


def server(**options):
    return DlmConfig.from_mapping(options, where="server")


def refused(call, *fragments):
    with pytest.raises(ValueError) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_nothing_set_gives_the_models_defaults():
    config = resolve(server(), None, DEFAULTS)
    assert (config.strategy, config.block_length) == ("threshold", 32)
    assert (config.cache, config.steps, config.reference_exact) == ("none", None, False)
    assert config.params == STRATEGIES["threshold"].Params()


def test_request_wins_over_server_wins_over_model():
    base = server(block_length=16, cache="prefix", steps=8, strategy="static")
    request = {"dlm": {"cache": "none", "block_length": 8}}
    config = resolve(base, request, DEFAULTS)
    assert (config.block_length, config.cache, config.steps) == (8, "none", 8)
    exact = server(reference_exact=True)
    assert resolve(exact, {}, DEFAULTS).reference_exact
    assert not resolve(exact, {"dlm_reference_exact": 0}, DEFAULTS).reference_exact


@pytest.mark.parametrize("option", ["steps", "steps_per_block"])
def test_steps_are_for_strategies_that_follow_a_schedule(option: str):
    """A request that sets them for another is refused; a server's leave it alone."""

    others = {
        "linear_spec": ModelDefaults("static", 8, 9, attention="causal", leads=True),
        "renoise": ModelDefaults("renoise", 8, -1, attention="causal", noise="uniform"),
    }

    def steps(base: DlmConfig, **request) -> tuple[int | None, int | None]:
        model = others.get(request.get("dlm_strategy"), DEFAULTS)
        config = resolve(base, request, model)
        return config.steps, config.steps_per_block

    asked = {f"dlm_{option}": 8}
    eight = (8, None) if option == "steps" else (None, 8)
    required = {"replay": {"dlm_recorded_steps": [0, 1]}}
    for name in STRATEGIES:
        request = {"dlm_strategy": name} | required.get(name, {})
        follows = STRATEGIES[name].schedule is True or name == "eoser"
        assert steps(server(**{option: 8}), **request) == (
            eight if follows else (None, None)
        )
        if follows:
            assert steps(server(), **request, **asked) == eight
            continue
        refused(
            partial(steps, server(), **request, **asked),
            f"{option} would be ignored",
            f"the strategy {name!r} follows no step schedule",
            "diffucoder, dream, eoser with schedule 'even', klass, learn2pd, pc, "
            "prophet, static, threshold with at_least 'scheduled'",
        )
    scheduled = {"dlm_at_least": "scheduled"}
    assert steps(server(), **scheduled, **asked) == eight
    assert steps(server(**{option: 8}), **scheduled) == eight
    doubling = {"dlm_strategy": "eoser", "dlm_schedule": "doubling"}
    refused(partial(steps, server(), **doubling, **asked), "'eoser' follows no")
    # A request's own win, of whatever kind.
    static = {"dlm_strategy": "static", "dlm_steps": 3}
    assert steps(server(**{option: 8}), **static) == (3, None)


def test_end_of_text_prediction_is_the_strategys_unless_set():
    def modes(base, **request):
        config = resolve(base, request, DEFAULTS)
        return config.eotp, config.eotp_threshold

    assert modes(server()) == ("off", 0.9)
    assert modes(server(), dlm_strategy="learn2pd") == ("block", 0.9)
    assert modes(server(), dlm_eotp="token", dlm_eotp_threshold=0) == ("token", 0.0)
    base = server(strategy="learn2pd", eotp="off", eotp_threshold=0.5)
    assert modes(base) == ("off", 0.5)
    assert modes(base, dlm_strategy="static") == ("off", 0.5)
    assert modes(base, dlm={"eotp": "block"}, dlm_eotp_threshold=2) == ("block", 2.0)
    refused(
        lambda: modes(base, dlm_eotp="paper"), "'off', 'block', 'token' or 'canvas'"
    )
    assert modes(base, dlm_eotp="canvas") == ("canvas", 0.5)
    for wrong in (True, 2.1, -1, "much"):
        refused(partial(modes, base, dlm_eotp_threshold=wrong), "eotp_threshold")
    for unread in (base, server()):
        ignored = "eotp_threshold would be ignored: eotp is 'off'"
        refused(partial(modes, unread, dlm_eotp_threshold=0.8), ignored)
        explicit = modes(unread, dlm_eotp="off", dlm_eotp_threshold=0.8)
        assert explicit == ("off", 0.8)
    refused(
        lambda: resolve(
            server(),
            {"dlm_eotp": "canvas"},
            ModelDefaults("threshold", 32, mask_token_id=9, attention="block"),
        ),
        "use 'off', 'block' or 'token'",
    )
    nested = {"strategy": "learn2pd", "strategy_config": {"eotp": "off"}}
    refused(lambda: modes(base, dlm=nested), "'eotp'", "beside strategy_config")


def test_tccf_is_for_block_causal_models():
    block_causal = ModelDefaults("threshold", 8, 9, attention="block")
    text = '{"trigger": "</think>", "check": [1, 2]}'
    for option in (text, {"trigger": "</think>", "check": [1, 2]}):
        config = resolve(server(), {"dlm_tccf": option}, block_causal)
        assert config.tccf is not None
        assert (config.tccf.trigger, config.tccf.check) == ("</think>", [1, 2])
    assert resolve(server(tccf=text), {}, block_causal).tccf == config.tccf
    refused(lambda: resolve(server(tccf=text), {}, DEFAULTS), "block-causal models")
    for wrong in ("{", {"trigger": "a"}, {"trigger": "", "check": "b"}):
        options = {"dlm": {"tccf": wrong}}
        refused(partial(resolve, server(), options, block_causal), "tccf")


def test_parameters_merge_for_the_same_strategy_and_never_leak_into_another():
    base = server(strategy="learn2pd", strategy_config={"threshold": 0.5})
    same = resolve(base, {"dlm": {"strategy_config": {}}}, DEFAULTS)
    assert same.params.threshold == 0.5
    other = resolve(base, {"dlm_strategy": "threshold"}, DEFAULTS)
    assert other.params == STRATEGIES["threshold"].Params()


def test_a_model_has_parameters_for_further_strategies():
    published = replace(DEFAULTS, other_strategies={"freedave": {"drafts": 8}})
    asked = {"dlm_strategy": "freedave"}
    assert resolve(server(), asked, published).params.drafts == 8
    assert resolve(server(), asked, DEFAULTS).params.drafts == 4
    base = server(strategy="freedave", strategy_config={"drafts": 3})
    assert resolve(base, None, published).params.drafts == 3
    assert resolve(base, {"dlm_drafts": 2}, published).params.drafts == 2


def test_who_may_look_ahead():
    """Whole blocks behind the active one, unless something looks at each step."""
    blocks = ModelDefaults("threshold", 4, 9, attention="block")
    asked = {"dlm_strategy": "freedave", "dlm_eager": True, "dlm_drafts": 6}

    def window(**more) -> int:
        return resolve(server(), asked | more, blocks).sized(20, 64).window

    assert window() == 4 + 8
    assert window(dlm_drafts=4) == 4 + 4
    assert window(dlm_eager=False) == 4
    assert window(dlm_step_map=True) == window(dlm_eotp="block") == 4
    assert window(dlm_reference_exact=True) == 4
    logged = server(record_traces=True)
    assert resolve(logged, asked, blocks).window == 4
    refused(lambda: resolve(server(), asked, DEFAULTS), "has full attention", "eager")
    leads = replace(blocks, leads=True)
    refused(lambda: resolve(server(), asked, leads), "first token of a block alone")


def test_who_may_verify_drafts():
    """Blocks of one token; views are as wide as a block of the model."""
    causal = ModelDefaults("threshold", 8, 9, attention="causal", leads=True)
    asked = {"dlm_strategy": "linear_spec"}
    config = resolve(server(), asked, causal).sized(20, 64)
    assert (config.block_length, config.window, config.sub_block_length) == (1, 8, 8)
    for other in (
        DEFAULTS,
        replace(causal, attention="block"),
        replace(causal, leads=False),
    ):
        refused(lambda model=other: resolve(server(), asked, model), "a causal model")
    options = {"dlm_step_map": True, "dlm_eotp": "token"}
    refused(lambda: resolve(server(), asked | options, causal), "step_map, eotp")


def test_the_default_strategy_takes_the_servers_parameters():
    base = server(strategy_config={"threshold": 0.7})
    assert resolve(base, None, DEFAULTS).params.threshold == 0.7
    named = resolve(base, {"dlm_strategy": "threshold"}, DEFAULTS)
    assert named.params.threshold == 0.7


@pytest.mark.parametrize(
    "extra_args",
    [
        {"dlm": {"strategy_config": {"threshold": 0.25}, "block_length": 8}},
        {"dlm": '{"strategy_config": {"threshold": 0.25}, "block_length": 8}'},
        {"dlm": {"strategy_config": '{"threshold": "0.25"}', "block_length": "8"}},
        {"dlm_threshold": 0.25, "dlm_block_length": 8.0},
        {"dlm_threshold": "0.25", "dlm_block_length": "8", "other": object()},
        {"dlm": {"block_length": 8, "cache": None}, "dlm_threshold": 0.25},
    ],
)
def test_forms_a_request_may_take(extra_args):
    config = resolve(server(), extra_args, DEFAULTS)
    assert (config.params.threshold, config.block_length) == (0.25, 8)


@pytest.mark.parametrize(
    ("extra_args", "fragments"),
    [
        ({"dlm": {"strategy": "nope"}}, ["'nope'", "threshold", "static"]),
        ({"dlm": {"blok_length": 8}}, ["'blok_length'", "'block_length'", "cache"]),
        ({"dlm": {"block_length": 0}}, ["block_length", "from 1 to 1024", "0"]),
        ({"dlm": {"block_length": 4096}}, ["1024", "4096"]),
        ({"dlm": {"block_length": 8.5}}, ["block_length", "8.5"]),
        ({"dlm": {"block_length": True}}, ["integer", "True"]),
        ({"dlm": {"steps": "many"}}, ["steps", "'many'"]),
        ({"dlm": {"cache": "all"}}, ["'none'", "'prefix'", "'dual'"]),
        (
            {"dlm": {"cache": "dual", "cache_config": {"look_back": 4}}},
            ["cache 'dual'", "'look_back'", "Valid: none"],
        ),
        (
            {"dlm": {"cache": "vicinity", "cache_config": {"lookback": 4}}},
            ["'lookback'", "'look_back'", "warmup_steps"],
        ),
        (
            {"dlm": {"cache": "vicinity", "cache_config": {"look_ahead": -1}}},
            ["look_ahead", "greater than or equal to 0", "-1"],
        ),
        (
            {"dlm": {"cache": "window", "cache_config": {"active_window": True}}},
            ["active_window", "number", "boolean"],
        ),
        (
            {"dlm": {"cache": "window", "cache_config": {"external_window": 8}}},
            ["external_window 8", "active_window 16"],
        ),
        ({"dlm_cache_config": "{"}, ["cache_config", "JSON"]),
        ({"dlm_commit": "separate"}, ["server", "--dlm-commit"]),
        ({"dlm": {"strategy_config": [1]}}, ["strategy_config", "dict"]),
        ({"dlm": {"strategy_config": "{"}}, ["strategy_config", "JSON"]),
        ({"dlm": {"strategy_config": {"threshold": 7}}}, ["threshold", "7"]),
        ({"dlm": {"strategy_config": {"treshold": 1}}}, ["'threshold'", "treshold"]),
        ({"dlm": {"strategy_config": {"threshold": True}}}, ["number", "boolean"]),
        (
            {"dlm": {"strategy": "threshold", "threshold": 0.5}},
            ["parameter of 'threshold'", "strategy_config"],
        ),
        ({"dlm": "{"}, ["dlm", "JSON"]),
        ({"dlm": "[" * 100_000}, ["dlm: not valid JSON", "recursion"]),
        ({"dlm_strategy_config": "[" * 100_000}, ["strategy_config", "recursion"]),
        ({"dlm": {"block_length": 10**400}}, ["block_length", "from 1 to 1024"]),
        ({"strategy": "static"}, ["'strategy'", "ignored", "'dlm_strategy'"]),
        ({"DLM_steps": 4}, ["'DLM_steps'", "ignored", "'dlm_steps'"]),
        ({"dlm": "[1]"}, ["dlm", "list"]),
        ({"dlm": 3}, ["dlm", "int"]),
        ({"dlm_treshold": 0.5}, ["'dlm_treshold'", "'dlm_threshold'", "dlm_cache"]),
        ({"dlm_factor": 1.0}, ["'dlm_factor'", "'threshold'"]),
        ({"dlm": {"max_canvas": 8}}, ["server", "--dlm-max-canvas", "strategy"]),
        ({"dlm_online_learning": 1}, ["server", "--dlm-online-learning"]),
        ({"dlm": {"cache": "dual"}, "dlm_cache": "dual"}, ["dlm_cache", "one place"]),
        (
            {"dlm": {"strategy_config": {"threshold": 0.5}}, "dlm_threshold": 0.5},
            ["dlm_threshold", "one place"],
        ),
    ],
)
def test_wrong_requests_say_what_is_right(extra_args, fragments):
    def admit():
        refuse_unread_options(extra_args)
        resolve(server(), extra_args, DEFAULTS)

    refused(admit, *fragments)


def test_parameters_of_a_cache_policy():
    """A request's over the server's, unless it names another policy."""
    options = server(cache="window", cache_config={"active_window": 8})
    flat = {"dlm_cache_config": '{"refresh_every": 9}'}
    window = resolve(options, flat, DEFAULTS).cache_policy
    assert window == Window(active_window=8, refresh_every=9)
    assert resolve(options, {"dlm_cache": "vicinity"}, DEFAULTS).cache_policy == (
        Vicinity()
    )
    refused(lambda: server(cache="prefix", cache_config={"refresh_every": 9}), "prefix")


def test_a_request_cannot_set_a_parameter_of_the_server(monkeypatch):
    class PathParams(Params):
        file: str | None = Field(None, json_schema_extra=SERVER_PARAMETER)

    class Rule(Strategy):
        name = "rule"
        Params = PathParams

    monkeypatch.setitem(STRATEGIES._targets, "rule", "tests:Rule")
    monkeypatch.setitem(STRATEGIES._loaded, "rule", Rule)
    base = server(strategy="rule", strategy_config={"file": "a"})
    assert resolve(base, {}, DEFAULTS).params.file == "a"
    refused(
        lambda: resolve(base, {"dlm_file": "/etc/x"}, DEFAULTS), "set by the server"
    )


def test_a_number_that_no_tensor_holds_is_refused(monkeypatch):
    """Also of a strategy that bounds nothing: it would hurt the whole batch."""

    class Unbounded(Params):
        bound: float = 1.0
        count: int = 1

    class Rule(Strategy):
        name = "rule"
        Params = Unbounded

    monkeypatch.setitem(STRATEGIES._targets, "rule", "tests:Rule")
    monkeypatch.setitem(STRATEGIES._loaded, "rule", Rule)
    for options in ({"dlm_bound": 1e300}, {"dlm_bound": -1e300}, {"dlm_count": 10**30}):
        refused(
            lambda options=options: resolve(server(strategy="rule"), options, DEFAULTS),
            "at most 1e+18",
        )


def test_server_options_are_checked_with_their_strategy():
    refused(lambda: server(strategy="nope"), "nope", "threshold")
    refused(
        lambda: server(strategy="threshold", strategy_config={"x": 1}), "'x'", "'thr"
    )
    refused(lambda: server(polar=1), "'polar'", "strategy_config", "max_canvas")
    refused(lambda: DlmConfig.from_mapping([], where="here"), "here", "list")


def vllm_config(options, **hf_config):
    hf = SimpleNamespace(
        dlm_class="full",
        dlm_strategy="threshold",
        dlm_block_length=32,
        mask_token_id=9,
        eos_token_id=[8, 7],
        vocab_size=128,
        **hf_config,
    )
    model_config = SimpleNamespace(hf_config=hf, max_model_len=256)
    return SimpleNamespace(additional_config=options, model_config=model_config)


def test_server_config_reads_additional_config():
    assert server_config(vllm_config({})) == DlmConfig()
    assert server_config(vllm_config({"dlm": {"steps": "4"}})).steps == 4
    assert ModelDefaults.from_hf_config(
        vllm_config({}).model_config.hf_config
    ) == ModelDefaults("threshold", 32, 9, stop_ids=(7, 8))


def test_server_config_knows_the_models_default_strategy():
    wrong = vllm_config({"dlm": {"strategy_config": {"factor": 1.0}}})
    refused(lambda: server_config(wrong), "'factor'", "'threshold'")
    for options, bound in (({}, "--max-model-len"), ({"max_canvas": 64}, "max_canvas")):
        wide = vllm_config({"dlm": {"block_length": 512, **options}})
        refused(lambda wide=wide: server_config(wide), "512", f"or raise {bound}")


def test_what_the_hook_stores_is_read_back():
    config = server(strategy="factor", max_canvas=64)
    for stored in (config, config.model_dump(), pickle.loads(pickle.dumps(config))):
        assert served_config(SimpleNamespace(dlm_server=stored)) == config
    assert served_config(SimpleNamespace()) == DlmConfig()


def test_canvas_limit_and_filter_folder(monkeypatch, tmp_path):
    assert server().canvas_limit(256) == 256
    assert server().canvas_limit(8192) == DEFAULT_MAX_CANVAS
    assert server(max_canvas=64).canvas_limit(8192) == 64
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert server().filters_path() == tmp_path / "vllm-dlm" / "filters"
    assert server(filter_dir="/x").strategy_options()["filter_dir"] == "/x"


def test_every_option_says_what_it_is():
    assert all(field.description for field in DlmConfig.model_fields.values())
    assert "max_canvas" not in REQUEST_OPTIONS
