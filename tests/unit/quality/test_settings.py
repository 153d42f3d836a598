# SPDX-License-Identifier: Apache-2.0
"""The grids: what they ask for, and that equal settings are one."""

from __future__ import annotations

import pytest

from aircache_sglang.config import AirCacheConfig
from benchmarks.quality.settings import (
    ALPHAS,
    DEFAULTS,
    FULL,
    GRIDS,
    MERGED,
    PRUNING,
    RETENTIONS,
    REVISIONS,
    SERVER,
    UNIFIED,
    Setting,
    current,
    grid,
    rare,
)
from benchmarks.quality.settings import POLICIES as ALL_POLICIES

POLICIES = ("h2o", "snapkv", "aircache")
PLAIN = Setting.of("aircache", 0.1)


def test_a_default_is_no_knob() -> None:
    assert Setting.of("aircache", 0.1, alpha=0.9, window="elite", **rare(merge=0.0)) == PLAIN
    assert Setting.of("aircache", 0.1, alpha=0.8) != PLAIN
    assert PLAIN.key() == {"policy": "aircache", "retention": 0.1}
    server = AirCacheConfig()
    assert {name: getattr(server, name) for name in DEFAULTS} == {**DEFAULTS, "budget": "global"}
    assert PLAIN.overrides() == {**PLAIN.key(), "min_visual_tokens": 1, "gate": "off", **DEFAULTS}


def test_rare_knobs_are_one_object() -> None:
    setting = Setting.of("aircache", 0.1, **rare(selection="shared", merge=0.5))
    assert setting.key()["ablation"] == {"merge": 0.5, "selection": "shared"}
    assert setting.overrides() == {
        **(PLAIN.overrides() or {}),
        "ablation": {"merge": 0.5, "selection": "shared"},
    }


def test_full_cache_and_server() -> None:
    assert Setting.of(FULL).overrides() == {"retention": 1.0}
    assert Setting.of(SERVER).overrides() is None
    assert not Setting.of(FULL).compresses and not Setting.of("snapkv", 1.0).compresses
    assert PLAIN.compresses
    with pytest.raises(ValueError, match="none takes no retention"):
        Setting.of(FULL, 0.5)
    with pytest.raises(ValueError, match=r"\(0, 1\], got 0"):
        Setting.of("snapkv", 0)


@pytest.mark.parametrize("name", GRIDS)
def test_grids(name: str) -> None:
    settings = grid(name, POLICIES, [0.2])
    assert settings[0] == Setting.of(FULL) and len(settings) > 1
    retentions = {setting.retention for setting in settings[1:]}
    assert len(retentions) == 1 and (retentions == {0.2} or name == "figure4")
    allowed = {"curve": ("aircache", "random"), "table1": POLICIES, "figure4": POLICIES}
    allowed |= {"table4": (*PRUNING, "aircache"), "pooling": ("snapkv",), "table6": UNIFIED}
    assert {s.policy for s in settings[1:]} <= {*allowed.get(name, ("aircache",))}


@pytest.mark.parametrize("name", GRIDS)
def test_the_server_takes_every_setting(name: str) -> None:
    for setting in grid(name, ALL_POLICIES, None):
        if setting.policy not in PRUNING:
            config = AirCacheConfig().with_overrides({"aircache": setting.overrides()})
            assert config.retention == setting.retention
            assert config.policy == setting.policy or setting.policy == FULL


def test_what_the_grids_share_is_asked_once() -> None:
    plain = {
        setting
        for name in ("table1", "table5", "table11", "table12", "heads", "cross")
        for setting in grid(name, POLICIES, [0.1])
        if setting.policy == "aircache" and not setting.knobs
    }
    assert plain == {PLAIN}
    assert {*grid("table13", POLICIES, None)} <= {*grid("table5", POLICIES, None)}
    alphas = {dict(s.knobs).get("alpha", 0.9) for s in grid("table12", POLICIES, [0.1])[1:]}
    assert alphas == {*ALPHAS}


def test_what_the_grids_ask_beyond_the_paper() -> None:
    windows = grid("table5", POLICIES, None)
    for retention in (0.1, 0.05, 0.02, 0.01):
        found = {dict(s.knobs).get("window") for s in windows if s.retention == retention}
        assert {"last-1", "last-5", "last-16", "last-32", "all", "visual-32"} <= found
    budgets = grid("budget", POLICIES, None)
    for retention in (0.1, 0.05, 0.02, 0.01):
        found = [dict(s.knobs).get("budget") for s in budgets if s.retention == retention]
        assert sorted(map(str, found)) == [
            "None",
            "global",
            "pyramid",
            "skewness",
            "strength",
            "uniform",
        ]
    ours = [s for s in grid("table1", ALL_POLICIES, None) if s.knobs]
    assert [dict(s.knobs) for s in ours] == [{"budget": "global"}] * len(RETENTIONS)
    assert not any(s.knobs for s in grid("table1", ("none", "aircache"), None))
    pools = grid("pooling", POLICIES, None)
    assert {s for s in pools[1:] if not s.knobs} <= {*grid("table1", ("snapkv",), None)}
    unpooled = [s for s in pools if s.knobs]
    assert len(unpooled) == 5
    assert all(s.key()["ablation"] == {"kernel": 1} for s in unpooled)
    for name, by in (("table11", "position"), ("similar", "similar")):
        knobs = [s.key().get("ablation") for s in grid(name, POLICIES, [0.1])[1:]]
        assert knobs == [{"merge": m, "merge_by": by} if m else None for m in MERGED]


def test_a_changed_policy_has_keys_of_its_own() -> None:
    """And the request knows nothing of it."""
    setting = Setting.of("elastic", 0.1)
    assert setting.key() == {"policy": "elastic", "retention": 0.1, "revision": 2}
    assert "revision" not in (setting.overrides() or {})
    assert current(setting.key()) and not current({"policy": "elastic", "retention": 0.1})
    assert current(PLAIN.key()) and "revision" not in PLAIN.key()
    assert {*REVISIONS} <= {*ALL_POLICIES}


def test_any_server_and_unknown_grids() -> None:
    assert grid("table1", [SERVER], None) == [Setting.of(SERVER)]
    with pytest.raises(ValueError, match=r"must be one of table1, .*, got 'table2'"):
        grid("table2", POLICIES, None)
