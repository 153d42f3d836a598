# SPDX-License-Identifier: Apache-2.0
"""patches/upstream against the installed SGLang: each applies, and its own tests pass."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATCHES = sorted((ROOT / "patches" / "upstream").glob("*.patch"))
per_patch = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)


def installed() -> Path:
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def touched(patch: Path) -> list[str]:
    """Files of SGLang's repository that a patch changes or adds."""
    return re.findall(r"^\+\+\+ b/(\S+)$", patch.read_text(), re.MULTILINE)


def lay_out(folder: Path, patches: Iterable[Path]) -> None:
    """Copies of the files that are changed, as they lie in SGLang's repository."""
    for name in {name for patch in patches for name in touched(patch)}:
        source = installed().parent / name.removeprefix("python/")
        if name.startswith("python/"):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            shutil.copyfile(source, target)


def apply(folder: Path, patch: Path) -> None:
    # Without a repository around it: git would leave out what lies below no part of it.
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", "--whitespace=error-all", str(patch)]
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_there_are_patches() -> None:
    assert len(PATCHES) >= 5
    assert [patch.name[:2] for patch in PATCHES] == [f"{n + 1:02}" for n in range(len(PATCHES))]


@per_patch
def test_it_applies_alone(patch: Path, tmp_path: Path) -> None:
    lay_out(tmp_path, [patch])
    before = {path: path.read_text() for path in tmp_path.rglob("*.py")}
    apply(tmp_path, patch)
    assert before
    for path, text in before.items():
        assert path.read_text() != text, f"{path} is as it was"


@per_patch
def test_it_says_why_and_brings_a_test(patch: Path) -> None:
    head = patch.read_text().partition("\n---\n")[0]
    assert head.startswith("Subject: [PATCH] ")
    assert re.search(r"#\d{4,}", head), "no report is named"
    assert max(map(len, head.splitlines())) <= 100
    assert any(name.startswith("test/registered/unit/") for name in touched(patch))


def overlay(folder: Path, patches: Iterable[Path]) -> list[str]:
    """The installed SGLang with the files of patches in their place; the tests that they add."""
    shutil.copytree(
        installed(),
        folder / "python" / "sglang",
        copy_function=os.symlink,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    lay_out(folder, patches)
    for patch in patches:
        apply(folder, patch)
    return [name for patch in patches for name in touched(patch) if name.startswith("test/")]


def run_tests(folder: Path, tests: list[str], source: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"),
            *("--continue-on-collection-errors", *tests),
        ],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_their_tests_pass(tmp_path: Path) -> None:
    """All together, in their order; without the changes each file of tests fails."""
    tests = overlay(tmp_path, PATCHES)
    patched = run_tests(tmp_path, tests, tmp_path / "python")
    assert patched.returncode == 0, patched.stdout
    stock = run_tests(tmp_path, tests, installed().parent)
    failed = {
        name for name in tests if re.search(rf"^(FAILED|ERROR) {name}", stock.stdout, re.MULTILINE)
    }
    assert failed == set(tests), stock.stdout
