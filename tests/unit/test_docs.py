# SPDX-License-Identifier: Apache-2.0
"""README and docs/ against the repository: sizes, links, flags, reasons."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "aircache_sglang"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SERVER_ARGS = ROOT / "patches" / "aircache_patches" / "server_args.py"
FIRST_SCREEN, CELL = 60, 120  # lines, characters

per_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchors(page: Path) -> set[str]:
    """As GitHub names headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def first_cells(page: Path) -> str:
    """The first cell of every row of the tables."""
    return "\n".join(re.findall(r"^\| ([^|]*)", page.read_text(), re.MULTILINE))


def test_the_first_screen_ends_before_the_use() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines.index("## Install") < lines.index("## Use") <= FIRST_SCREEN


@per_page
def test_no_long_cell_in_a_table(page: Path) -> None:
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    cells = [cell.strip() for row in rows for cell in re.split(r"(?<!\\)\|", row)]
    assert [cell for cell in cells if len(cell) > CELL] == []


@per_page
def test_links_resolve(page: Path) -> None:
    targets = re.findall(r"\]\(([^)]+)\)", page.read_text())
    broken = []
    for target in targets:
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        if not found.exists() or (anchor and anchor not in anchors(found)):
            broken.append(target)
    assert broken == []


def test_flags_are_those_of_the_server() -> None:
    [arguments] = [
        node
        for node in ast.parse(SERVER_ARGS.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "AirCacheServerArgs"
    ]
    fields = [
        node.target.id
        for node in arguments.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]
    named = re.findall(r"`--([a-z-]+)", first_cells(ROOT / "docs" / "flags.md"))
    assert len(fields) > 10
    assert sorted(named) == sorted(field.replace("_", "-") for field in fields)


def test_reasons_are_those_of_the_code() -> None:
    from aircache_sglang.runtime.decide import Reason

    text = (ROOT / "docs" / "answers.md").read_text()
    table = text.partition("## The reasons")[2].partition("\n## ")[0]
    named = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(named) == sorted(reason.value for reason in Reason)


def test_the_main_path_can_be_read_in_an_hour() -> None:
    """docs/design.md names its files and counts their lines."""
    text = (ROOT / "docs/design.md").read_text()
    part = text.partition("### The main path")[2].partition("##")[0]
    rows = re.findall(r"^\| `([\w/.]+)` \| (\d+) \|", part, re.MULTILINE)
    counted = {path: len((SOURCES / path).read_text().splitlines()) for path, _ in rows}
    assert {path: int(lines) for path, lines in rows} == counted
    for path, lines in re.findall(r"`(\w+/\w+\.py)` \((\d+)\)", part):
        assert len((SOURCES / path).read_text().splitlines()) == int(lines), path
    total = sum(counted.values())
    assert len(rows) <= 8 and total <= 1700
    assert f"eight files, {total:,} lines" in part
