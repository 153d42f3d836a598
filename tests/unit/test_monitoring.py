# SPDX-License-Identifier: Apache-2.0
"""The dashboard and the rules of examples/monitoring: what they name exists, and what exists is
shown; alerts by Prometheus' own tests; the dashboard by Grafana's own types."""

from __future__ import annotations

import ast
import fcntl
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.prometheus import CONFIGURATION, DASHBOARD, MONITORING, RULES, find, panels

ROOT = Path(__file__).parents[2]
# Apache-2.0, generated from Grafana's own schemas.
GRAFANA_TYPES = "grafana-foundation-sdk==1769699998!10.1.0"
EXPOSED = {
    "Counter": ("_total",),
    "Gauge": ("",),
    "Summary": ("_sum", "_count"),
    "Histogram": ("_bucket", "_sum", "_count"),
}


def registered(*folders: Path) -> dict[str, set[str]]:
    """Each metric that the sources make, by the name it is given, and the names it exposes."""
    found: dict[str, set[str]] = {}
    for path in itertools.chain.from_iterable(folder.rglob("*.py") for folder in folders):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            kind = getattr(node.func, "id", getattr(node.func, "attr", ""))
            named = [word.value for word in node.keywords if word.arg == "name"]
            for first in [*node.args[:1], *named]:
                value = first.value if isinstance(first, ast.Constant) else None
                if isinstance(value, str) and value.startswith("sglang:") and kind in EXPOSED:
                    base = value.removesuffix("_total")
                    found[base] = {base + suffix for suffix in EXPOSED[kind]}
    return found


def metrics_of(expression: str) -> set[str]:
    return set(re.findall(r"sglang:\w+", expression))


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return dict(json.loads(DASHBOARD.read_text()))


@pytest.fixture(scope="module")
def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.fixture(scope="module")
def ours() -> dict[str, set[str]]:
    found = registered(ROOT / "aircache_sglang", ROOT / "patches")
    assert len(found) >= 13 and all(name.startswith("sglang:aircache_") for name in found)
    return found


def test_what_is_named_exists(
    dashboard: dict[str, Any], rules: list[dict[str, Any]], ours: dict[str, set[str]]
) -> None:
    spec = find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations
    theirs = registered(Path(spec.submodule_search_locations[0]) / "srt" / "observability")
    exposed = set(itertools.chain(*ours.values(), *theirs.values()))
    expressions = [expression for _, expression in panels(dashboard)]
    expressions += [rule["expr"] for rule in rules]
    expressions += [each["query"] for each in dashboard["templating"]["list"]]
    assert set().union(*map(metrics_of, expressions)) <= exposed
    recorded = {rule["record"] for rule in rules if "record" in rule}
    assert set(re.findall(r"aircache:\w+:\w+", "\n".join(expressions))) == recorded


def test_every_metric_of_ours_is_shown(
    dashboard: dict[str, Any], rules: list[dict[str, Any]], ours: dict[str, set[str]]
) -> None:
    shown = "\n".join(expression for _, expression in panels(dashboard))
    behind = [rule["expr"] for rule in rules if rule.get("record", "-") in shown]
    named = metrics_of("\n".join([shown, *behind]))
    assert [name for name, exposed in ours.items() if not exposed & named] == []


def test_panels_say_what_they_are_and_do_not_overlap(dashboard: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    drawn = dashboard["panels"]
    assert len({panel["id"] for panel in drawn}) == len(drawn)
    for panel in drawn:
        place = panel["gridPos"]
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or (panel["description"] and panel["targets"])
    titles = [panel["title"] for panel in drawn if panel["type"] != "row"]
    listed = (ROOT / "docs/monitoring.md").read_text().partition("## The dashboard")[2]
    assert re.findall(r"^\| \*\*([^*]+)\*\*", listed, re.MULTILINE) == titles


def test_rules_are_prometheus_rules() -> None:
    for command in (["check", "rules", RULES], ["check", "config", CONFIGURATION]):
        done = subprocess.run([find("promtool"), *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_raised_where_it_should_be(rules: list[dict[str, Any]]) -> None:
    """And not where it should not: `good` servers in the same test."""
    file = MONITORING / "aircache.rules.test.yml"
    done = subprocess.run([find("promtool"), "test", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    raised = {
        one["alertname"]
        for test in yaml.safe_load(file.read_text())["tests"]
        for one in test.get("alert_rule_test", ())
        if one.get("exp_alerts")
    }
    alerts = {rule["alert"] for rule in rules if "alert" in rule}
    assert raised == alerts
    explained = re.findall(r"^\| `(AirCache\w+)`", (ROOT / "docs/monitoring.md").read_text(), re.M)
    assert sorted(explained) == sorted(alerts)


def lost(ours: Any, theirs: Any, place: str = "") -> Iterator[str]:
    """Where `theirs` does not hold what `ours` says."""
    if isinstance(ours, dict):
        for key, value in ours.items():
            if not isinstance(theirs, dict) or key not in theirs:
                yield f"{place}/{key}"
            else:
                yield from lost(value, theirs[key], f"{place}/{key}")
    elif isinstance(ours, list):
        for index, (left, right) in enumerate(zip(ours, theirs, strict=True)):
            yield from lost(left, right, f"{place}/{index}")
    elif ours != theirs:
        yield place


READ = """
import json, sys
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
register_default_plugins()
json.dump(Dashboard.from_json(json.load(sys.stdin)), sys.stdout, cls=JSONEncoder)
"""


def grafana_types() -> Path:
    """The folder of Grafana's types, installed at the first call beside .ci/env's base."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    envs = Path(os.environ.get("AIRCACHE_ENV_DIR") or Path(cache) / "aircache-sglang")
    folder = envs / "grafana-types-10.1.0"
    envs.mkdir(parents=True, exist_ok=True)
    with (envs / "grafana-types.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            argv = [*pip, "--target", str(folder), GRAFANA_TYPES]
            done = subprocess.run(argv, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"needs Grafana's types: {done.stderr.strip()[-200:]}")
            (folder / ".complete").touch()
    return folder


def test_grafana_knows_every_field_of_the_dashboard(dashboard: dict[str, Any]) -> None:
    """Its types read the dashboard and write it again: a field they do not know would be lost."""
    env = os.environ | {"PYTHONPATH": str(grafana_types())}
    argv = [sys.executable, "-c", READ]

    def again(wanted: dict[str, Any]) -> Any:
        said = json.dumps(wanted)
        done = subprocess.run(argv, env=env, input=said, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert list(lost(dashboard, again(dashboard))) == []
    wrong = json.loads(json.dumps(dashboard))
    wrong["panels"][1]["gridPosition"] = {}
    wrong["panels"][1]["fieldConfig"]["defaults"]["custom"]["fill"] = 1
    assert sorted(lost(wrong, again(wrong))) == [
        "/panels/1/fieldConfig/defaults/custom/fill",
        "/panels/1/gridPosition",
    ]
