# SPDX-License-Identifier: Apache-2.0
"""Who imports whom: one door to SGLang, one direction, no circles."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Import name of each folder of sources.
SOURCES = {
    "aircache_sglang": ROOT / "aircache_sglang",
    "aircache_kernels": ROOT / "kernels/aircache_kernels",
    "aircache_patches": ROOT / "patches/aircache_patches",
    "benchmarks": ROOT / "benchmarks",
    "examples": ROOT / "examples",
}
PRODUCT = ("aircache_sglang", "aircache_kernels", "aircache_patches")
# The door: all others of the product know no SGLang.
FACE_SGLANG = (
    "aircache_patches",
    "aircache_sglang.engine",
    "aircache_sglang.platform",
    "aircache_sglang.frontend",
    "aircache_sglang.explain.frames",
)
# What each part may import of ours; longest prefix first.
MAY_IMPORT = {
    "aircache_kernels": ("aircache_kernels",),
    "aircache_sglang.policy": ("aircache_sglang.policy",),
    "aircache_sglang.config": ("aircache_sglang.config",),
    "aircache_sglang.platform": ("aircache_sglang.platform",),
    "aircache_sglang.frontend": ("aircache_sglang.config",),
    "aircache_sglang.runtime": (
        "aircache_sglang.runtime",
        "aircache_sglang.policy",
        "aircache_sglang.config",
        "aircache_kernels",
    ),
    "aircache_sglang.engine": (
        "aircache_sglang.engine",
        "aircache_sglang.runtime",
        "aircache_sglang.policy",
        "aircache_sglang.config",
    ),
    "aircache_sglang.testing": (
        "aircache_sglang.testing",
        "aircache_sglang.policy",
        "aircache_sglang.config",
    ),
    "aircache_sglang": ("aircache_sglang",),
    "aircache_patches": PRODUCT,
    "benchmarks": (*PRODUCT, "benchmarks", "examples"),
    "examples": (*PRODUCT, "benchmarks", "examples"),
}


def under(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def modules() -> dict[str, Path]:
    """Every module by name."""
    found = {}
    for name, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((name, *parts))] = path
    return found


MODULES = modules()


def imported(path: Path) -> Iterator[str]:
    """Names that a file imports, wherever it does, but for its type checker."""
    hidden: set[ast.AST] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            hidden.update(child for part in node.body for child in ast.walk(part))
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


IMPORTS = {name: set(imported(path)) for name, path in MODULES.items()}


def test_the_walk_sees_imports_in_functions() -> None:
    assert "aircache_sglang.runtime.kernel_pass" in IMPORTS["aircache_sglang.engine.compressor"]
    assert any(under(name, "sglang") for name in IMPORTS["aircache_sglang.engine.tree"])
    assert "aircache_sglang.engine.compressor" not in IMPORTS["aircache_patches.process"]


@pytest.mark.parametrize("name", [name for name in MODULES if under(name, *PRODUCT)])
def test_one_door_to_sglang(name: str) -> None:
    facing = {target for target in IMPORTS[name] if under(target, "sglang", "sgl_kernel")}
    assert not facing or under(name, *FACE_SGLANG), f"{name} imports {sorted(facing)}"


@pytest.mark.parametrize("name", MODULES)
def test_one_direction(name: str) -> None:
    rule = max((prefix for prefix in MAY_IMPORT if under(name, prefix)), key=len)
    ours = {target for target in IMPORTS[name] if under(target, *SOURCES, "tests")}
    wrong = {target for target in ours if not under(target, *MAY_IMPORT[rule])}
    assert not wrong, f"{name} imports {sorted(wrong)}"
    if under(name, *PRODUCT) and not under(name, "aircache_sglang.testing"):
        assert not any(under(target, "aircache_sglang.testing") for target in ours)


def test_no_circle() -> None:
    """A module reaches itself through no other; packages count by what they import themselves."""
    edges = {name: IMPORTS[name] & set(MODULES) for name in MODULES}
    circles = []
    for name in MODULES:
        reached, waiting = set(), list(edges[name])
        while waiting:
            target = waiting.pop()
            if target not in reached:
                reached.add(target)
                waiting.extend(edges[target])
        if name in reached:
            circles.append(name)
    assert not circles, f"in circles: {circles}"


def test_runtime_and_policy_import_without_sglang() -> None:
    """As on a machine with torch and triton alone."""
    names = [n for n in MODULES if under(n, "aircache_sglang.runtime", "aircache_sglang.policy")]
    names += ["aircache_sglang.engine.backend", "benchmarks.bench_kernels"]
    program = (
        "import importlib, sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('sglang', 'sgl_kernel', 'flashinfer'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        f"for name in {names}: importlib.import_module(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_engine_reads_resolved_settings() -> None:
    """`server_args` holds what was asked for; what SGLang made of it is in its runtime context."""
    files = (ROOT / "aircache_sglang/engine").glob("*.py")
    assert [file.name for file in files if ".server_args." in file.read_text()] == []


def test_no_package_of_ours_hides_hugging_faces_kernels() -> None:
    """SGLang imports `kernels` from site-packages in a `try`: ours would change its attention."""
    program = "import kernels; print(kernels.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd="/", capture_output=True, text=True, check=False
    )
    assert "site-packages" in done.stdout, done.stderr
