# SPDX-License-Identifier: Apache-2.0
"""Two releases of a package side by side, by their sources: nothing of them is imported.

What counts is the code: comments, docstrings and line numbers may differ.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import difflib
import enum
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
NAMED = (*FUNCTIONS, ast.ClassDef)
# What a line can define: a function or class, an attribute of self, a name of a class or module.
_DEFINES = re.compile(
    r"^\s*(?:async )?(?:def|class) (\w+)|\bself\.(\w+)(?:: [^=\n]+)? = "
    r"|^(?:    )?(\w+)\s*(?::|=[^=])",
    re.MULTILINE,
)


class Status(enum.IntEnum):
    """What became of one object, the worst last."""

    UNCHANGED = 0
    BODY = 1
    SIGNATURE = 2
    MISSING = 3

    @property
    def words(self) -> str:
        return ("unchanged", "body changed", "signature changed", "missing")[self]


@dataclasses.dataclass(frozen=True)
class Definition:
    """Where a dotted name leads to. `nodes` is empty for a module, several for a property's parts
    and overloads."""

    module: str
    path: Path
    nodes: tuple[ast.stmt, ...]

    @property
    def place(self) -> str:
        return f"{self.path}:{self.nodes[0].lineno if self.nodes else 1}"

    @property
    def code(self) -> str:
        return "\n".join(ast.unparse(_undocumented(node)) for node in self.nodes)

    @property
    def signature(self) -> list[str]:
        return [_signature(node) for node in self.nodes]


def _undocumented(node: ast.stmt) -> ast.stmt:
    """A copy without docstrings, its own and its members'."""
    node = copy.deepcopy(node)
    for child in ast.walk(node):
        if isinstance(child, NAMED) and ast.get_docstring(child, clean=False) is not None:
            child.body = child.body[1:] or [ast.Pass()]
    return node


def _signature(node: ast.stmt) -> str:
    """How a function is called: names, kinds and defaults of its arguments, decorators, async."""
    if not isinstance(node, FUNCTIONS):
        return type(node).__name__
    arguments = copy.deepcopy(node.args)
    for child in ast.walk(arguments):
        if isinstance(child, ast.arg):
            child.annotation = None
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    return f"{type(node).__name__} {decorators} {ast.unparse(arguments)}"


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Of a module or a class, those in `if`, `try` and `with` included."""
    for node in body:
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            for field in ("body", "handlers", "orelse", "finalbody"):
                for part in getattr(node, field, ()):
                    inside = part.body if isinstance(part, ast.ExceptHandler) else [part]
                    yield from _statements(inside)
        else:
            yield node


def _names(node: ast.stmt) -> list[str]:
    """What a statement defines."""
    if isinstance(node, NAMED):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    parts = [part for target in targets if target is not None for part in ast.walk(target)]
    return [part.id for part in parts if isinstance(part, ast.Name)]


def _defined(body: Sequence[ast.stmt]) -> dict[str, tuple[ast.stmt, ...]]:
    found: dict[str, tuple[ast.stmt, ...]] = {}
    for node in _statements(body):
        for name in _names(node):
            found[name] = (*found.get(name, ()), node)
    return found


@functools.cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@functools.cache
def _scope(file: Path) -> dict[str, tuple[ast.stmt, ...]]:
    """What a module defines."""
    return _defined(_tree(file).body)


@functools.cache
def _imports(file: Path, package: tuple[str, ...]) -> dict[str, str]:
    """Name to the dotted name that it stands for, for imports in functions, too."""
    found: dict[str, str] = {}
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            for alias in node.names:
                found.setdefault(alias.asname or alias.name, f"{module}.{alias.name}")
    return found


@functools.cache
def _index(root: Path, package: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in sorted(root.joinpath(*package.split(".")).rglob("*.py")):
        text, line, end = path.read_text(), 1, 0
        for match in _DEFINES.finditer(text):
            start = match.start(match.lastindex or 0)
            line, end = line + text.count("\n", end, start), start
            place = f"{path.relative_to(root)}:{line}"
            found.setdefault(match[match.lastindex or 0], []).append(place)
    return found


class Sources:
    """The sources of one release: `root` is a folder on whose import path its packages lie."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path_of(self, module: str) -> Path | None:
        """A module's file, relative to the root."""
        path = Path(*module.split("."))
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if (self.root / candidate).is_file():
                return candidate
        return None

    def find(self, target: str) -> Definition | None:
        """The definition that a dotted name leads to, through re-exports and base classes."""
        return self._find(target, frozenset())

    def _find(self, target: str, seen: frozenset[str]) -> Definition | None:
        parts = target.split(".")
        for count in range(len(parts), 0, -1):
            module = ".".join(parts[:count])
            path = self.path_of(module)
            if path is not None:
                break
        else:
            return None
        rest = parts[count:]
        if not rest:
            return Definition(module, path, ())
        file = self.root / path
        scope, imports = _scope(file), _imports(file, path.parent.parts)
        if rest[0] in scope:
            found = Definition(module, path, scope[rest[0]])
        elif rest[0] in imports and target not in seen:
            above = ".".join((imports[rest[0]], *rest[1:]))
            return self._find(above, seen | {target})
        else:
            return None
        for name in rest[1:]:
            member = self.members(found).get(name)
            if member is None:
                return None
            found = member
        return found

    def members(self, definition: Definition) -> dict[str, Definition]:
        """A class's methods and attributes, inherited ones of this release included."""
        found: dict[str, Definition] = {}
        for node in definition.nodes:
            if not isinstance(node, ast.ClassDef):
                continue
            for base in reversed(node.bases):
                above = self.find(f"{definition.module}.{ast.unparse(base)}")
                if above is not None and above != definition:
                    found.update(self.members(above))
            for name, nodes in _defined(node.body).items():
                found[name] = Definition(definition.module, definition.path, nodes)
        return found

    def files(self, package: str) -> Iterator[Path]:
        """A package's files, relative to the root."""
        folder = self.root.joinpath(*package.split("."))
        for path in sorted(folder.rglob("*.py")):
            yield path.relative_to(self.root)

    def index(self, package: str) -> dict[str, list[str]]:
        """Every name that a line of a package can define (functions, classes, fields, attributes),
        and where. By lines alone, since a large package takes a minute to parse."""
        return _index(self.root, package)


@dataclasses.dataclass(frozen=True)
class Moved:
    """One dotted name in both releases.

    note: a sentence for the reader.
    members: what changed in a class, member by member.
    """

    target: str
    status: Status
    old: Definition | None
    new: Definition | None
    note: str = ""
    members: tuple[Moved, ...] = ()

    def diff(self, lines: int) -> list[str]:
        """Unified, without comments and docstrings, cut after `lines`."""
        if self.old is None or self.new is None or self.members:
            return []
        old, new = (part.code.splitlines() for part in (self.old, self.new))
        found = list(difflib.unified_diff(old, new, lineterm="", n=1))[2:]
        left = len(found) - lines
        return [*found[:lines], f"... {left} more lines"] if left > 0 else found


def compare(target: str, old: Sources, new: Sources, named: frozenset[str] = frozenset()) -> Moved:
    """One dotted name. `named` are the names that our code says, overrides and calls alike: a
    class's signature is that of those members. A name that `old` lacks, too, is missing."""
    before, after = old.find(target), new.find(target)
    if before is None or after is None:
        note = "" if before is not None else "missing in the pinned release, too"
        return Moved(target, Status.MISSING, before, after, note)
    if before.nodes and isinstance(before.nodes[0], ast.ClassDef):
        return _compare_class(target, old, new, before, after, named)
    return Moved(target, _status(before, after), before, after)


def _status(before: Definition, after: Definition) -> Status:
    if before.signature != after.signature:
        return Status.SIGNATURE
    return Status.UNCHANGED if before.code == after.code else Status.BODY


def _compare_class(
    target: str,
    old: Sources,
    new: Sources,
    before: Definition,
    after: Definition,
    named: frozenset[str],
) -> Moved:
    if before.signature != after.signature:
        return Moved(target, Status.SIGNATURE, before, after, "no longer a class")
    ours, theirs = old.members(before), new.members(after)
    changed = []
    for name, member in ours.items():
        there = theirs.get(name)
        status = Status.MISSING if there is None else _status(member, there)
        if status:
            changed.append(Moved(f"{target}.{name}", status, member, there))
    used = [part for part in changed if part.target.rpartition(".")[2] in named]
    added = [name for name in theirs if name not in ours]
    heads = [_head(part) for part in (before, after)]
    status = Status.UNCHANGED
    if changed or added or heads[0] != heads[1]:
        status = max([Status.BODY, *(part.status for part in used)])
    notes = []
    if len(changed) > len(used):
        others = [part.target.rpartition(".")[2] for part in changed if part not in used]
        notes.append(f"changed or gone, not named by us: {', '.join(others)}")
    if added:
        notes.append(f"new: {', '.join(added)}")
    if heads[0] != heads[1]:
        notes.append(f"{heads[0]} is now {heads[1]}")
    return Moved(target, status, before, after, "; ".join(notes), tuple(used))


def _head(definition: Definition) -> str:
    """A class's first line and its decorators."""
    heads = []
    for node in definition.nodes:
        if isinstance(node, ast.ClassDef):
            node = copy.copy(node)
            node.body = [ast.Pass()]
            heads.append(ast.unparse(node).replace("\n    pass", "").replace("\n", " "))
    return " ".join(heads)
