# SPDX-License-Identifier: Apache-2.0
"""What `make upgrade-check` says of two releases of small made-up packages."""

from __future__ import annotations

import textwrap
from importlib.metadata import distributions
from pathlib import Path
from xml.etree.ElementTree import Element, fromstring

import pytest

from tests.upgrade import touched
from tests.upgrade.__main__ import exit_code, places, summary
from tests.upgrade.compare import Moved, Sources, Status, compare
from tests.upgrade.release import held, install, megabytes, unmet
from tests.upgrade.trial import Outcome, counted, reason


def sources(folder: Path, **files: str) -> Sources:
    """A package `engine` of these modules; `a_b` is the file a/b.py, `a_` is a/__init__.py."""
    for name, text in files.items():
        *above, last = name.split("_")
        path = folder.joinpath("engine", *above, f"{last or '__init__'}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return Sources(folder)


def status_of(tmp_path: Path, old: str, new: str, name: str = "f") -> Status:
    releases = [sources(tmp_path / side, m=text) for side, text in (("old", old), ("new", new))]
    return compare(f"engine.m.{name}", *releases).status


BASIS = "def f(a, b=1):\n    return a\n"


@pytest.mark.parametrize(
    ("new", "status"),
    [
        (
            '# a word\n\n\ndef f(a, b=1):\n    """What it does."""\n    return (a)\n',
            Status.UNCHANGED,
        ),
        ("def f(a, b=1):\n    return b\n", Status.BODY),
        ("def f(a: int, b=1) -> int:\n    return a\n", Status.BODY),
        ("def f(a, b=2):\n    return a\n", Status.SIGNATURE),
        ("def f(a, c=1):\n    return a\n", Status.SIGNATURE),
        ("def f(a, *, b=1):\n    return a\n", Status.SIGNATURE),
        ("async def f(a, b=1):\n    return a\n", Status.SIGNATURE),
        ("@cached\ndef f(a, b=1):\n    return a\n", Status.SIGNATURE),
        ("f = len\n", Status.SIGNATURE),
        ("def g(a, b=1):\n    return a\n", Status.MISSING),
        ("if True:\n    def f(a, b=1):\n        return a\n", Status.UNCHANGED),
    ],
)
def test_a_function(tmp_path: Path, new: str, status: Status) -> None:
    assert status_of(tmp_path, BASIS, new) is status


def test_a_constant(tmp_path: Path) -> None:
    assert status_of(tmp_path / "1", "LIMIT = 1\n", "LIMIT: int = 1\n", "LIMIT") is Status.SIGNATURE
    assert status_of(tmp_path / "2", "LIMIT = 1\n", "LIMIT = 2\n", "LIMIT") is Status.BODY
    assert status_of(tmp_path / "3", "A, LIMIT = 1, 2\n", "A = 1\n", "LIMIT") is Status.MISSING


def test_a_property_is_all_its_parts(tmp_path: Path) -> None:
    getter = "class C:\n    @property\n    def f(self):\n        return 1\n"
    setter = "    @f.setter\n    def f(self, value):\n        {}\n"
    old, new = getter + setter.format("pass"), getter + setter.format("self.x = value")
    assert status_of(tmp_path, old, new, "C.f") is Status.BODY


def test_a_name_is_followed_to_where_it_is_defined(tmp_path: Path) -> None:
    """Through imports, relative ones and those in functions, and out of a package's front."""
    old = sources(tmp_path / "old", a=BASIS, front="from engine.a import f\n")
    new = sources(
        tmp_path / "new",
        deep_inner=BASIS,
        deep_="from .inner import f as exported\n",
        front="def run():\n    from engine.deep import exported as f\n",
    )
    moved = compare("engine.front.f", old, new)
    assert moved.status is Status.UNCHANGED
    assert places(moved.old, moved.new) == "engine/a.py:1 -> engine/deep/inner.py:1"
    assert compare("engine.a", old, new).status is Status.MISSING
    a, b = ("from engine.b import f\n", "from engine.a import f\n")
    assert sources(tmp_path / "circle", a=a, b=b).find("engine.b.f") is None


OLD_TREE = """
class Base:
    def match(self, key):
        return key
class Tree(Base):
    limit = 4
    def insert(self, key):
        return key
    def evict(self, count):
        return count
    def report(self):
        return 1
"""


def tree(folder: Path, *changes: tuple[str, str], named: str = "match insert limit") -> Moved:
    """`Tree` in a release that differs by these replacements."""
    text = OLD_TREE
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    old, new = sources(folder / "old", m=OLD_TREE), sources(folder / "new", m=text)
    return compare("engine.m.Tree", old, new, frozenset(named.split()))


def test_an_inherited_method_belongs_to_the_class(tmp_path: Path) -> None:
    moved = tree(tmp_path, ("match(self, key)", "match(self, key, depth)"))
    assert moved.status is Status.SIGNATURE
    assert [part.target for part in moved.members] == ["engine.m.Tree.match"]
    assert places(moved.members[0].old, moved.members[0].new) == "engine/m.py:3 -> :3"


def test_a_member_that_we_name_decides(tmp_path: Path) -> None:
    evict = ("def evict(self, count)", "def evict(self, count, tier)")
    moved = tree(tmp_path / "1", evict)
    assert (moved.status, moved.members) == (Status.BODY, ())
    assert moved.note == "changed or gone, not named by us: evict"
    assert tree(tmp_path / "2", evict, named="evict").status is Status.SIGNATURE
    assert tree(tmp_path / "3", ("    limit = 4\n", "")).status is Status.MISSING
    assert tree(tmp_path / "4").status is Status.UNCHANGED


def test_a_new_member_and_another_base_are_seen(tmp_path: Path) -> None:
    moved = tree(tmp_path, ("report", "describe"), ("Tree(Base)", "Tree(Base, Other)"))
    assert moved.status is Status.BODY
    assert "new: describe" in moved.note
    assert "class Tree(Base): is now class Tree(Base, Other):" in moved.note


def test_the_diff_shows_code_alone_and_is_cut(tmp_path: Path) -> None:
    body = "".join(f"    x{i} = {{}}\n" for i in range(9))
    old = sources(tmp_path / "old", m="def f():\n    # why\n" + body.format(*range(9)))
    new = sources(tmp_path / "new", m="def f():\n" + body.format(0, *range(1, 8), 80))
    moved = compare("engine.m.f", old, new)
    assert moved.diff(9)[1:] == ["     x7 = 7", "-    x8 = 8", "+    x8 = 80"]
    assert moved.diff(3)[-1] == "... 1 more lines"


def test_the_index_knows_functions_fields_and_attributes(tmp_path: Path) -> None:
    text = """
    class C:
        field: int
        def method(self):
            self.kept = self.other.read
            self.typed: int = 1
            if self.asked == 1:
                local = 2
    """
    index = sources(tmp_path, m=text).index("engine")
    assert index["kept"] == ["engine/m.py:5"] and index["typed"] == ["engine/m.py:6"]
    assert {"C", "field", "method"} <= index.keys()
    assert not {"read", "other", "asked", "local"} & index.keys()


def test_what_our_code_touches(tmp_path: Path) -> None:
    file = tmp_path / "ours.py"
    file.write_text(
        textwrap.dedent("""
        import os
        from engine.m import Tree
        TARGET = "engine.m.Other"
        TEXT = "engine.m is a module"
        class Ours(Tree):
            def insert(self, request):
                from engine.deep import f
                super().insert(request.key, getattr(request, "extra_key"))
                return self.own
        """)
    )
    found = touched.imported([file], "engine")
    assert list(found) == ["engine.m.Tree", "engine.m.Other", "engine.deep.f"]
    assert found["engine.m.Tree"] == f"{file}:3"
    assert touched.named([file]) >= {"insert", "key", "extra_key", "own"}
    override = {"own": 1, "insert": 1}
    assert touched.foreign([file], override) == {"insert", "key", "extra_key"}
    assert touched.foreign([file], {**override, "insert": 2}) == {"key", "extra_key"}


def test_the_door_is_all_that_imports_sglang() -> None:
    found = touched.imported(touched.door())
    assert len(found) > 50
    assert "sglang.srt.mem_cache.radix_cache.RadixCache" in found
    assert "sglang.srt.server_args.ServerArgs" in found


def distribution(folder: Path, name: str, version: str, *requires: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, ""]))
    (info / "RECORD").write_text("a.py,,1500000\nb.so,,500000\n")


def test_requirements_that_the_base_does_not_meet(tmp_path: Path) -> None:
    distribution(tmp_path / "base", "Some_Thing", "1.0")
    distribution(tmp_path / "base", "fine", "2.0rc1")
    wanted = ["some.thing==1.1", "fine>=2.0rc1", "absent; extra == 'dev'", "x; python_version<'3'"]
    distribution(tmp_path / "release", "engine", "9.0", *wanted, "new[gpu]>1")
    [engine] = distributions(path=[str(tmp_path / "release")])
    base = held(tmp_path / "base")
    assert [str(found) for found in unmet(engine, base)] == ["some.thing==1.1", "new[gpu]>1"]
    assert megabytes(base["some-thing"]) == 2.0


@pytest.mark.parametrize("version", ["", "latest", "--pre", "0.5.23; x", "5"])
def test_what_is_no_version_is_refused(tmp_path: Path, version: str) -> None:
    with pytest.raises(ValueError, match="looks like"):
        install(version, tmp_path / "lib" / "python" / "site-packages")


def test_a_failure_says_what_was_raised_last() -> None:
    failure = Element("failure", message="AssertionError: a.py:5: UserWarning")
    assert reason(failure) == "AssertionError: a.py:5: UserWarning"
    failure.text = "E    AssertionError: a.py:5: UserWarning\nE      ImportError: no f\nE    assert"
    assert reason(failure) == "ImportError: no f"


def test_tests_are_counted_and_grouped_by_their_reason() -> None:
    report = """<testsuites><testsuite>
    <testcase classname="a" name="fine"/>
    <testcase classname="a" name="left"><skipped/></testcase>
    <testcase classname="a" name="one"><failure message="">E   OSError: no /x/y</failure></testcase>
    <testcase classname="b" name="two"><error message="">E   OSError: no /x/y</error></testcase>
    <testcase classname="b" name="both"><failure message="wrong"/><error message="end"/></testcase>
    </testsuite></testsuites>"""
    passed, skipped, failed = counted(fromstring(report).iter("testcase"), "/x/")
    assert (passed, skipped) == (1, 1)
    assert failed == {"OSError: no y": ["a::one", "b::two"], "wrong": ["b::both"]}


def test_the_exit_code_is_0_where_nothing_moved_and_all_passed() -> None:
    still, passed = {"hooks": [Status.UNCHANGED] * 2}, {"unit tests": Outcome(True, "2 passed")}
    assert exit_code(still, passed) == 0
    assert exit_code({"hooks": [Status.UNCHANGED, Status.BODY]}, passed) == 1
    assert exit_code(still, {**passed, "servers": Outcome(False, "1 failed")}) == 1
    lines = summary(still, passed).splitlines()
    assert lines[1].split() == ["hooks", "2", "0", "0", "0"]
    assert lines[2].split() == ["unit", "tests", "yes", "2", "passed"]
