# SPDX-License-Identifier: Apache-2.0
"""The hooks: where they are, when they are applied, and when SGLang is left alone."""

from __future__ import annotations

import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from aircache_patches import install, ledger
from aircache_patches.refusal import Refusal
from aircache_sglang.config import AirCacheConfig
from aircache_sglang.testing.checkpoints import make_qwen2_vl

ROOT = Path(__file__).resolve().parents[2]
SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
TARGETS = [hook.target for hook in ledger.hooks()]
OF_A_PAIR = {
    mode: [hook.target for hook in ledger.disaggregation_hooks(mode)]
    for mode in ("prefill", "decode")
}
OF_A_SHADOW = [hook.target for hook in ledger.shadow_hooks() if hook.target not in TARGETS]
ALL_TARGETS = list(
    dict.fromkeys([*TARGETS, *OF_A_PAIR["prefill"], *OF_A_PAIR["decode"], *OF_A_SHADOW])
)


def test_the_kernels_of_hugging_face_are_not_shadowed() -> None:
    spec = importlib.util.find_spec("kernels")
    assert spec is not None and spec.origin is not None
    assert "site-packages" in Path(spec.origin).parts


def test_our_packages_come_from_this_checkout_or_its_wheel() -> None:
    for name in ("aircache_sglang", "aircache_kernels", "aircache_patches"):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None, name


def test_this_sglang_is_a_tested_one() -> None:
    assert version("sglang") in ledger.TESTED_VERSIONS


@pytest.mark.parametrize("target", ALL_TARGETS)
def test_targets_exist(target: str) -> None:
    assert callable(pkgutil.resolve_name(target))


def test_no_target_is_hooked_twice() -> None:
    for mode, more in OF_A_PAIR.items():
        assert len({*TARGETS, *more}) == len(TARGETS) + len(more)
        assert ledger.missing_targets(mode) == []
    for shadow in (False, True):
        targets = [hook.target for hook in ledger.hooks_for("null", shadow=shadow)]
        assert sorted(targets) == sorted(TARGETS + OF_A_SHADOW * shadow)
    assert ledger.missing_targets(shadow=True) == []


def test_another_release_is_let_in_by_its_name_and_loudly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make upgrade-check` sets the variable; a check that comes after the version's tells."""
    monkeypatch.setattr(ledger, "TESTED_VERSIONS", ("0.0.0",))
    monkeypatch.setattr(ledger, "missing_targets", lambda mode, shadow: ["the next check"])
    for value in ("", "1", "0.0.1"):
        monkeypatch.setenv(install.UPGRADE_CHECK, value)
        with pytest.raises(Refusal, match="is tested with SGLang 0"):
            install.install("aircache", AirCacheConfig())
    assert "TESTED" not in capsys.readouterr().err
    monkeypatch.setenv(install.UPGRADE_CHECK, version("sglang"))
    with pytest.raises(Refusal, match="the next check"):
        install.install("aircache", AirCacheConfig())
    assert "IS NOT A TESTED VERSION" in capsys.readouterr().err


def test_a_missing_target_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.managers.schedule_batch import ScheduleBatch

    monkeypatch.delattr(ScheduleBatch, "prepare_for_extend")
    assert ledger.missing_targets() == [
        "sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_extend"
    ]


@pytest.mark.parametrize(
    "name", [SERVER_ARGS, *ALL_TARGETS, *(step for step, _ in ledger.resolution_hooks())]
)
def test_the_ledger_explains_each_hook(name: str) -> None:
    text = (ROOT / "patches" / "README.md").read_text()
    assert f"`{name.removeprefix('sglang.srt.')}`" in text


def test_the_ledger_names_the_tested_versions() -> None:
    text = (ROOT / "patches" / "README.md").read_text()
    for tested in ledger.TESTED_VERSIONS:
        assert tested in text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2_vl(tmp_path_factory.mktemp("hooks") / "model", layers=1)


def states_of(model: Path, *flags: str) -> list[dict[str, Any]]:
    """In a fresh process and in one that it spawned."""
    command = [sys.executable, "-m", "tests.support.hook_states", "--device", "cpu"]
    result = subprocess.run(
        [*command, "--model-path", str(model), *flags],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 2, result.stdout
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("flags", [(), ("--kv-policy", "none", "--aircache-retention", "0.5")])
def test_without_a_policy_sglang_runs_its_own_functions(
    model: Path, flags: tuple[str, ...]
) -> None:
    for state in states_of(model, *flags):
        assert state["original"] == dict.fromkeys(TARGETS, True)
        assert state["patched"] == [SERVER_ARGS]


def test_with_a_policy_every_process_has_every_hook(model: Path) -> None:
    for state in states_of(model, "--kv-policy", "aircache"):
        assert state["original"] == dict.fromkeys(TARGETS, False)
        assert state["patched"] == sorted([SERVER_ARGS, *TARGETS])


def test_a_server_with_a_shadow_has_its_own_hooks_too(model: Path) -> None:
    for state in states_of(model, "--kv-policy", "aircache", "--aircache-shadow", "0.1"):
        assert state["patched"] == sorted([SERVER_ARGS, *TARGETS, *OF_A_SHADOW])


@pytest.mark.parametrize("mode", OF_A_PAIR)
def test_a_server_of_a_pair_has_its_own_hooks_too(model: Path, mode: str) -> None:
    flags = "--kv-policy", "aircache", "--disaggregation-mode", mode
    for state in states_of(model, *flags):
        assert state["patched"] == sorted([SERVER_ARGS, *TARGETS, *OF_A_PAIR[mode]])
