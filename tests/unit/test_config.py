# SPDX-License-Identifier: Apache-2.0
"""The knobs: what is accepted, and what is refused in which words."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aircache_sglang.config import (
    BUDGET_MODES,
    ELITE_MODES,
    INSTRUCTION_LIMIT,
    POLICIES,
    Ablation,
    AirCacheConfig,
)
from aircache_sglang.runtime.choice import policy_of

FIELDS = tuple(field.name for field in dataclasses.fields(AirCacheConfig))
# `policy` is --kv-policy, and `ablation` a JSON object: they have tests of their own.
REQUEST_ONLY = ("return_selection", "min_visual_mass")
SERVER_ONLY = ("pin_text", "rungs", "shadow", "guard")
FLAGS = tuple(name for name in FIELDS if name not in (*REQUEST_ONLY, "policy", "ablation"))

BAD: list[tuple[str, Any]] = [
    *(("retention", value) for value in (0, 0.0, -0.1, 1.5, math.nan, math.inf, "0.1", None, True)),
    *(("retention", value) for value in (-math.inf, [0.1], 2)),
    *(("alpha", value) for value in (2, -0.01, math.nan, "all", None, False)),
    *(("budget", value) for value in ("uniforms", "", None, 1, ["uniform"])),
    *(
        ("window", value)
        for value in ("last-0", "last-", "last--1", "last-1.5", "Last-3", "first-3")
    ),
    *(("window", value) for value in ("last-513", "last-0012", " last-3", "", None, 3)),
    *(("elite", value) for value in ("per_head", "", None)),
    *(("min_visual_tokens", value) for value in (0, -1, 1.0, "64", None, True)),
    *(("reuse", value) for value in ("lossy", "", None, True)),
    *(("gate", value) for value in ("on", "", None, False)),
    *(("return_selection", value) for value in (1, 0, "true", None)),
    *(("policy", value) for value in ("snap", "", None, 1)),
    *(("min_visual_mass", value) for value in (0, 1.1, math.nan, "0.9", True)),
    *(("window", value) for value in ("visual-0", "visual-513", "visual")),
]
GOOD: list[tuple[str, Any]] = [
    *(("retention", value) for value in (1e-9, 0.1, 1, 1.0)),
    *(("alpha", value) for value in (0, 0.0, 0.5, 1)),
    *(("budget", value) for value in BUDGET_MODES),
    *(("window", value) for value in ("elite", "all", "last-1", "last-99", "last-512")),
    *(("elite", value) for value in ELITE_MODES),
    *(("min_visual_tokens", value) for value in (1, 10_000)),
    *(("reuse", value) for value in ("exact", "compressed")),
    *(("gate", value) for value in ("auto", "off")),
    *(("return_selection", value) for value in (True, False)),
    *(("policy", value) for value in (*POLICIES, "none")),
    *(("min_visual_mass", value) for value in (0.01, 1, None)),
    *(("window", value) for value in ("visual-1", "visual-32", "visual-512")),
]


def server_args(**changes: Any) -> SimpleNamespace:
    values = {f"aircache_{name}": getattr(AirCacheConfig(), name) for name in FLAGS}
    values |= {"kv_policy": "aircache", "aircache_ablation": "{}"}
    return SimpleNamespace(**(values | {f"aircache_{name}": x for name, x in changes.items()}))


def test_defaults() -> None:
    """The paper's but for the budgets."""
    assert AirCacheConfig() == AirCacheConfig(
        retention=0.1,
        alpha=0.9,
        budget="global",
        window="elite",
        elite="per-head",
        min_visual_tokens=64,
        return_selection=False,
    )
    assert AirCacheConfig.from_server_args(server_args()) == AirCacheConfig()


@pytest.mark.parametrize(("name", "value"), GOOD)
def test_good_values(name: str, value: Any) -> None:
    config = AirCacheConfig().with_overrides({"aircache": {name: value}})
    assert getattr(config, name) == value
    assert (
        dataclasses.replace(config, **{name: getattr(AirCacheConfig(), name)}) == AirCacheConfig()
    )
    if name in FLAGS:
        assert AirCacheConfig.from_server_args(server_args(**{name: value})) == config


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_overrides_name_the_key_and_the_value(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        AirCacheConfig().with_overrides({"aircache": {name: value}})
    message = str(caught.value)
    assert message.startswith(f"aircache.{name} must be ")
    assert message.endswith(f", got {value!r}")


@pytest.mark.parametrize(("name", "value"), [bad for bad in BAD if bad[0] in FLAGS])
def test_bad_flags_name_the_flag_and_the_value(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        AirCacheConfig.from_server_args(server_args(**{name: value}))
    message = str(caught.value)
    assert message.startswith(f"--aircache-{name.replace('_', '-')} must be ")
    assert message.endswith(f", got {value!r}")


def test_an_unknown_key_is_named_beside_the_known_ones() -> None:
    with pytest.raises(ValueError) as caught:
        AirCacheConfig().with_overrides({"aircache": {"retension": 0.5}})
    assert "'retension'" in str(caught.value)
    known = str(caught.value).split("known keys: ")[1].split(", ")
    assert known == [name for name in FIELDS if name not in SERVER_ONLY]


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, "0.5", None, True])
def test_the_pinned_share_is_a_flag_alone(value: Any) -> None:
    with pytest.raises(ValueError, match="--aircache-pin-text"):
        AirCacheConfig.from_server_args(server_args(pin_text=value))
    with pytest.raises(ValueError, match="unknown key 'pin_text'"):
        AirCacheConfig().with_overrides({"aircache": {"pin_text": 0.5}})


@pytest.mark.parametrize("name", ["shadow", "guard"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, "0.5", True])
def test_the_shadow_and_its_guard_are_flags_alone(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"--aircache-{name} must be a number"):
        AirCacheConfig.from_server_args(server_args(**{"shadow": 0.1, "guard": 0.1, name: value}))
    with pytest.raises(ValueError, match=f"unknown key '{name}'"):
        AirCacheConfig().with_overrides({"aircache": {name: 0.5}})


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ({"shadow": 0.0}, "--aircache-shadow above 0"),
        ({"when": "pressure", "rungs": "0.5,0.1"}, "--aircache-rungs unset"),
        ({"reuse": "compressed", "session_columns": 64}, "--aircache-session-columns unset"),
    ],
)
def test_what_a_guard_needs(flags: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=f"--aircache-guard needs {wanted}"):
        AirCacheConfig.from_server_args(server_args(**{"shadow": 0.1, "guard": 0.02, **flags}))


def test_a_guarded_servers_requests_may_have_conversations() -> None:
    config = AirCacheConfig.from_server_args(server_args(shadow=0.1, guard=0.02))
    overrides = {"reuse": "compressed", "session_columns": 64}
    assert config.with_overrides({"aircache": overrides}).session_columns == 64


@pytest.mark.parametrize("overrides", ["0.1", 0.1, [], ["retention"], True])
def test_overrides_must_be_an_object(overrides: Any) -> None:
    with pytest.raises(ValueError, match=r'custom_params\["aircache"\] must be an object'):
        AirCacheConfig().with_overrides({"aircache": overrides})


@pytest.mark.parametrize(
    "params", [None, {}, {"other": 1}, {"aircache": None}, {"aircache": {}}, 3]
)
def test_nothing_to_override(params: Any) -> None:
    assert AirCacheConfig(retention=0.3).with_overrides(params) == AirCacheConfig(retention=0.3)


def test_an_override_starts_from_the_servers_values() -> None:
    server = AirCacheConfig(retention=0.3, alpha=0.5, window="all", min_visual_tokens=8)
    config = server.with_overrides({"aircache": {"retention": 0.05, "return_selection": True}})
    assert config == dataclasses.replace(server, retention=0.05, return_selection=True)
    assert server.retention == 0.3


def test_the_policy_flag_is_named_as_the_operator_knows_it() -> None:
    args = server_args()
    args.kv_policy = "snap"
    with pytest.raises(ValueError, match=r"--kv-policy must be one of none, aircache, .*'snap'"):
        AirCacheConfig.from_server_args(args)
    args.kv_policy = "snapkv"
    assert AirCacheConfig.from_server_args(args).policy == "snapkv"


BAD_ABLATIONS: list[tuple[Any, str]] = [
    (
        {"mege": 0.5},
        r" has the unknown key 'mege'; known keys: selection, merge, merge_by, rank, seed",
    ),
    ({"selection": "all"}, r"\.selection must be one of per-head, shared, got 'all'"),
    ({"merge": 1.5}, r"\.merge must be a number with 0 <= x <= 1, got 1\.5"),
    ({"merge_by": "key"}, r"\.merge_by must be one of position, similar, got 'key'"),
    ({"rank": -1}, r"\.rank must be an integer >= 0, got -1"),
    ({"rank": 2**64 - 1}, r"\.rank must be an integer <= 2147483647, got 18446744073709551615"),
    ({"seed": 2**31}, r"\.seed must be an integer <= 2147483647, got 2147483648"),
    ({"kernel": 2**16 + 1}, r"\.kernel must be an odd integer <= 65535, got 65537"),
    ({"seed": True}, r"\.seed must be an integer >= 0, got True"),
    ({"kernel": 4}, r"\.kernel must be an odd integer >= 1, got 4"),
    ({"sinks": 0.5}, r"\.sinks must be an integer >= 0, got 0\.5"),
    ({"floor": 1.5}, r"\.floor must be a number with 0 <= x <= 1, got 1\.5"),
    ({"audience": "text"}, r"\.audience must be one of visual, all, got 'text'"),
    ([1], r" must be an object, got \[1\]"),
]


@pytest.mark.parametrize(("value", "message"), BAD_ABLATIONS, ids=str)
def test_bad_ablations(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"^aircache\.ablation" + message):
        AirCacheConfig().with_overrides({"aircache": {"ablation": value}})
    with pytest.raises(ValueError, match="^--aircache-ablation" + message):
        AirCacheConfig.from_server_args(server_args(ablation=json.dumps(value)))


@pytest.mark.parametrize("text", ["", "{", "none", None])
def test_an_ablation_flag_that_is_no_json(text: Any) -> None:
    with pytest.raises(ValueError, match=r"^--aircache-ablation must be a JSON object, got"):
        AirCacheConfig.from_server_args(server_args(ablation=text))


def test_a_request_changes_single_knobs_of_the_servers_ablation() -> None:
    server = AirCacheConfig.from_server_args(server_args(ablation='{"merge": 0.5, "rank": 2}'))
    assert server.ablation == Ablation(merge=0.5, rank=2)
    config = server.with_overrides({"aircache": {"ablation": {"merge": 0, "selection": "shared"}}})
    assert config.ablation == Ablation(selection="shared", rank=2)
    assert config.variant() != server.variant()


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"policy": "snapkv"}, "policy snapkv"),
        ({"reuse": "compressed"}, "reuse compressed"),
        ({"window": "visual-8"}, "window visual-8"),
        ({"min_visual_mass": 0.9}, "min_visual_mass 0.9"),
    ],
    ids=str,
)
def test_what_does_not_go_with_evicting_text(overrides: dict[str, Any], named: str) -> None:
    unified = {"ablation": {"audience": "all"}}
    for allowed in ({}, {"policy": "h2o"}, {"policy": "none"}, {"window": "last-16"}):
        AirCacheConfig().with_overrides({"aircache": {**unified, **allowed}})
    message = rf"^aircache\.ablation with audience all does not go with aircache\.{named}"
    with pytest.raises(ValueError, match=message):
        AirCacheConfig().with_overrides({"aircache": {**unified, **overrides}})
    server = AirCacheConfig.from_server_args(server_args(ablation='{"audience": "all"}'))
    with pytest.raises(ValueError, match=message):
        server.with_overrides({"aircache": overrides})
    server.with_overrides({"aircache": {**overrides, "ablation": {"audience": "visual"}}})


def test_a_server_that_evicts_text_needs_a_policy_that_can() -> None:
    args = server_args(ablation='{"audience": "all"}')
    args.kv_policy = "snapkv"
    message = "^--aircache-ablation with audience all does not go with --kv-policy snapkv; its pol"
    with pytest.raises(ValueError, match=message):
        AirCacheConfig.from_server_args(args)


IN_VAIN: list[tuple[dict[str, Any], str]] = [
    ({"policy": "snapkv", "budget": "strength"}, "aircache.budget is a knob of aircache, not of"),
    ({"policy": "h2o", "window": "last-3"}, "aircache.window is a knob of aircache, snapkv, pyra"),
    ({"policy": "random", "ablation": {"kernel": 3}}, "aircache.ablation.kernel is a knob of snap"),
    ({"ablation": {"seed": 3}}, "aircache.ablation.seed is a knob of random, not of policy airc"),
    ({"policy": "snapkv", "window": "all"}, "aircache.window must be last-N with policy snapkv"),
    ({"min_visual_mass": 0.9, "retention": 0.1}, "chooses the retention; drop aircache.retention"),
]


@pytest.mark.parametrize(("overrides", "message"), IN_VAIN, ids=str)
def test_a_knob_that_would_be_turned_in_vain(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AirCacheConfig().with_overrides({"aircache": overrides})
    # as the server's default the same knob only waits for a policy that has it
    AirCacheConfig(budget="strength", window="all").with_overrides({"aircache": {"policy": "h2o"}})


def test_what_requests_must_share_to_share_a_replica() -> None:
    changes: list[dict[str, Any]] = [
        {},
        *({"policy": name} for name in POLICIES if name != "aircache"),
        {"retention": 0.2},
        {"min_visual_mass": 0.2},
        {"window": "all"},
        {"ablation": {"merge": 0.2}},
    ]
    variants = [AirCacheConfig().with_overrides({"aircache": c}).variant() for c in changes]
    assert len(set(variants)) == len(changes)
    one = AirCacheConfig(retention=0.2).with_overrides({"aircache": {"min_visual_mass": 0.5}})
    other = AirCacheConfig().with_overrides({"aircache": {"min_visual_mass": 0.5}})
    assert one.variant() == other.variant(), "the retention is chosen, not asked for"


@pytest.mark.parametrize(
    ("config", "observed"),
    [
        (AirCacheConfig(), (INSTRUCTION_LIMIT, 0)),
        (AirCacheConfig(window="last-7"), (7, 0)),
        (AirCacheConfig(window="visual-32"), (0, 32)),
        (AirCacheConfig(policy="snapkv"), (32, 0)),
        (AirCacheConfig(policy="pyramidkv"), (8, 0)),
        (AirCacheConfig(policy="pyramidkv", window="last-16"), (16, 0)),
        (AirCacheConfig(policy="vlcache", window="last-16"), (INSTRUCTION_LIMIT, 0)),
    ],
)
def test_observed(config: AirCacheConfig, observed: tuple[int, int]) -> None:
    assert config.observed() == observed


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_retention_is_accepted_exactly_in_its_interval(value: float) -> None:
    try:
        config = AirCacheConfig().with_overrides({"aircache": {"retention": value}})
    except ValueError:
        assert not 0 < value <= 1
    else:
        assert 0 < value <= 1
        assert config.retention == value


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (AirCacheConfig(), (INSTRUCTION_LIMIT, 0.9)),
        (AirCacheConfig(alpha=0.25), (INSTRUCTION_LIMIT, 0.25)),
        (AirCacheConfig(window="all"), (INSTRUCTION_LIMIT, 0.0)),
        (AirCacheConfig(window="last-7", alpha=1.0), (7, 0.0)),
    ],
)
def test_scoring_window(config: AirCacheConfig, window: tuple[int, float]) -> None:
    assert config.scoring_window() == window


def test_configuration_needs_neither_torch_nor_sglang() -> None:
    code = (
        "import sys; import aircache_sglang.config; "
        "sys.exit(bool({'torch', 'sglang', 'triton'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# What another value of each knob is, and what else it takes to be read.
TURNED: dict[str, tuple[Any, dict[str, Any]]] = {
    "alpha": (0.3, {}),
    "budget": ("strength", {}),
    "window": ("last-3", {}),
    "elite": ("shared", {}),
    "ablation.selection": ("shared", {}),
    "ablation.merge": (0.5, {}),
    "ablation.merge_by": ("similar", {"merge": 0.5}),
    "ablation.rank": (3, {}),
    "ablation.seed": (3, {}),
    "ablation.kernel": (3, {}),
    "ablation.sinks": (3, {}),
}


def settings_of(config: AirCacheConfig) -> tuple[Any, ...]:
    """All that a pass reads of a configuration (runtime/compress.py)."""
    return (
        policy_of(config),
        config.observed(),
        # The mass of every policy is the elite window's.
        (config.alpha, config.elite),
        (config.ablation.merge, config.ablation.merge and config.ablation.merge_by),
        config.ablation.rank,
        policy_of(config).shares_selection or config.ablation.selection == "shared",
    )


@pytest.mark.parametrize("name", TURNED)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_turned_knob_is_read_or_refused(policy: str, name: str) -> None:
    """By a server and by a request alike; never is it ignored."""
    value, beside = TURNED[name]
    knob, _, inner = name.partition(".")
    change = {inner: value, **beside} if inner else value
    base = {"policy": policy, **({"ablation": beside} if beside else {})}
    flags = server_args(**{knob: json.dumps(change) if inner else change})
    flags.kv_policy = policy
    plain = AirCacheConfig().with_overrides({"aircache": base})
    try:
        asked = AirCacheConfig().with_overrides({"aircache": {**base, knob: change}})
    except ValueError as refusal:
        assert name in str(refusal) and policy in str(refusal)
        with pytest.raises(ValueError, match="--aircache-") as at_start:
            AirCacheConfig.from_server_args(flags)
        assert name in str(at_start.value) and policy in str(at_start.value)
        return
    served = AirCacheConfig.from_server_args(flags)
    assert settings_of(asked) == settings_of(served)
    assert settings_of(asked) != settings_of(plain), f"{policy} does nothing with {name}"


@pytest.mark.parametrize(
    ("policy", "knobs"),
    [
        *(("aircache", {"budget": budget}) for budget in BUDGET_MODES),
        *((policy, {}) for policy in POLICIES if policy != "aircache"),
    ],
)
def test_an_even_share_is_of_budgets_from_one_threshold(policy: str, knobs: dict[str, str]) -> None:
    changes = {"policy": policy, "ablation": {"floor": 0.25}, **knobs}
    flags = server_args(ablation=json.dumps({"floor": 0.25}), **knobs)
    flags.kv_policy = policy
    if knobs == {"budget": "global"}:
        served = AirCacheConfig.from_server_args(flags)
        assert settings_of(served) != settings_of(AirCacheConfig(budget="global"))
        # Another budget inherits it in vain, and is served as without.
        other = served.with_overrides({"aircache": {"budget": "uniform"}})
        assert settings_of(other) == settings_of(AirCacheConfig(budget="uniform"))
        return
    with pytest.raises(ValueError, match=r"ablation\.floor is"):
        AirCacheConfig().with_overrides({"aircache": changes})
    with pytest.raises(ValueError, match=r"--aircache-ablation\.floor is"):
        AirCacheConfig.from_server_args(flags)


def test_what_a_request_inherits_is_no_fault_of_its_own() -> None:
    served = AirCacheConfig.from_server_args(server_args(budget="strength", window="all"))
    other = served.with_overrides({"aircache": {"policy": "snapkv"}})
    plain = AirCacheConfig().with_overrides({"aircache": {"policy": "snapkv"}})
    assert settings_of(other) == settings_of(plain)


def test_merging_by_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ablation\.merge_by is read with merge above 0 alone"):
        AirCacheConfig().with_overrides({"aircache": {"ablation": {"merge_by": "similar"}}})


@pytest.mark.parametrize(
    ("rungs", "found"),
    [("0.5,0.25,0.1", (0.5, 0.25, 0.1)), ("0.2", (0.2,)), ("1,0.5", (1.0, 0.5)), ("", ())],
)
def test_rungs_end_at_the_retention(rungs: str, found: tuple[float, ...]) -> None:
    config = AirCacheConfig.from_server_args(server_args(when="pressure", rungs=rungs))
    assert config.rungs == found
    assert config.retention == (found[-1] if found else 0.1)
    assert config.ladder() == (found or (0.1,))
    # A request's own retention is its last rung; `prefill` packs once.
    own = config.with_overrides({"aircache": {"retention": 0.3}})
    assert own.ladder() == (*(rung for rung in found if rung > 0.3), 0.3)
    assert config.with_overrides({"aircache": {"when": "prefill"}}).ladder() == (config.retention,)


@pytest.mark.parametrize(
    "rungs", ["0.1,0.5", "0.5,0.5", "0.5,0", "1.5,0.5", "-1", "a,b", "0.5,,0.1", "0.5;0.1", "nan"]
)
def test_rungs_that_are_no_ladder(rungs: str) -> None:
    with pytest.raises(ValueError, match="--aircache-rungs must be shares that descend") as caught:
        AirCacheConfig.from_server_args(server_args(when="pressure", rungs=rungs))
    assert repr(rungs) in str(caught.value)


def test_rungs_and_retention_must_not_contradict_each_other() -> None:
    args = server_args(when="pressure", rungs="0.5,0.2", retention=0.3)
    with pytest.raises(ValueError, match=r"ends at 0\.2 and --aircache-retention is 0\.3"):
        AirCacheConfig.from_server_args(args)


def test_a_shared_replica_is_packed_once() -> None:
    args = server_args(when="pressure", rungs="0.5,0.2", reuse="compressed")
    with pytest.raises(ValueError, match="--aircache-reuse compressed"):
        AirCacheConfig.from_server_args(args)


NOT_LATER: list[tuple[dict[str, Any], str]] = [
    ({"min_visual_mass": 0.5}, "min_visual_mass 0.5"),
    ({"ablation": {"merge": 0.5}}, "ablation merge above 0"),
    ({"ablation": {"audience": "all"}}, "ablation audience all"),
]


@pytest.mark.parametrize(("overrides", "named"), NOT_LATER)
def test_what_only_the_prefill_can_do(overrides: dict[str, Any], named: str) -> None:
    message = rf"aircache.when pressure does not go with aircache.{named}"
    with pytest.raises(ValueError, match=message):
        AirCacheConfig().with_overrides({"aircache": {"when": "pressure", **overrides}})


SESSION = {"reuse": "compressed", "session_columns": 40}


def test_a_bounded_conversation() -> None:
    config = AirCacheConfig.from_server_args(server_args(**SESSION, rungs="0.3,0.1"))
    assert config.session_rungs() == (0.3, 0.1)
    other = config.with_overrides({"aircache": {"session_columns": 50}})
    assert other.variant() != config.variant()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"reuse": "exact"}, "session_columns needs aircache.reuse compressed"),
        ({"when": "pressure"}, "session_columns needs aircache.when prefill"),
        ({"policy": "snapkv"}, "session_columns needs aircache.policy aircache"),
        ({"window": "visual-8"}, "session_columns needs aircache.window elite"),
        ({"min_visual_mass": 0.5}, "session_columns needs aircache.min_visual_mass unset"),
        ({"ablation": {"rank": 2}}, "session_columns needs aircache.ablation unset"),
        ({"session_columns": 5}, "must hold one picture on its smallest rung, that is 6 columns"),
        ({"session_columns": 0}, "session_columns must be an integer >= 1, got 0"),
        ({"session_columns": 2**31}, "session_columns must be an integer <= 2147483647"),
        ({"session_columns": "many"}, "session_columns must be an integer >= 1, got 'many'"),
    ],
)
def test_a_conversation_that_cannot_be_bounded(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AirCacheConfig().with_overrides({"aircache": {**SESSION, **overrides}})
