# SPDX-License-Identifier: Apache-2.0
"""What our code touches of SGLang: the ledger's hooks, and what the door's files import or name."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The only places that import SGLang; tests/unit/test_imports.py holds that.
DOOR = (
    *("aircache_sglang/engine", "aircache_sglang/platform", "aircache_sglang/frontend.py"),
    "aircache_sglang/explain/frames.py",
    "patches/aircache_patches",
)
PIPELINE = "sglang.srt.arg_groups.pipeline"


def door() -> list[Path]:
    """The files that face SGLang."""
    found: list[Path] = []
    for name in DOOR:
        path = ROOT / name
        found += [path] if path.is_file() else sorted(path.rglob("*.py"))
    return found


def hook_targets() -> list[str]:
    """The ledger's hooks, in its order, then those of a pair of servers."""
    from aircache_patches import ledger

    pair = (ledger.disaggregation_hooks(mode) for mode in ("prefill", "decode"))
    found = [*ledger.hooks(), *(hook for side in pair for hook in side)]
    return list(dict.fromkeys(hook.target for hook in found))


def step_targets() -> list[str]:
    """The wrapped steps of argument resolution, as its pipeline imports them."""
    from aircache_patches import ledger

    return [f"{PIPELINE}.{step}" for step, _ in ledger.resolution_hooks()]


def imported(files: list[Path], package: str = "sglang") -> dict[str, str]:
    """Dotted names of `package` that files import or have as a string; to the first place."""
    found: dict[str, str] = {}
    for path in files:
        tree = ast.parse(path.read_text())
        where = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        for name, line in _imported(tree):
            if name.startswith(package + "."):
                found.setdefault(name, f"{where}:{line}")
    return found


def _imported(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            dotted = all(part.isidentifier() for part in node.value.split("."))
            yield from [(node.value, node.lineno)] * dotted


def named(files: list[Path]) -> frozenset[str]:
    """Every attribute that files read, set, look up by `getattr` or define as a function: what they
    call, what they override, and the fields they read."""
    found: set[str] = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found.add(node.name)
            else:
                found.update(_attribute(node))
    return frozenset(found)


def foreign(files: list[Path], own: Mapping[str, int]) -> set[str]:
    """Attributes that files say of objects which are not ours.

    `own` counts how often our sources define a name. One that they define is ours, unless they do
    so once and call it of `super()`: then it is an override.
    """
    found: set[str] = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "super()":
                found.update([node.attr] * (own.get(node.attr, 0) < 2))
            else:
                found.update(set(_attribute(node)).difference(own))
    return found


def _attribute(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
        for argument in node.args[1:2]:
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield argument.value
