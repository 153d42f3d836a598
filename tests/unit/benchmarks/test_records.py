# SPDX-License-Identifier: Apache-2.0
"""Result files: what may be continued, and what is said where it may not."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.records import ROOT, Results, git, provenance, read, stored, unpack


def test_parts_of_another_machine_are_not_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cpu.jsonl"
    Results(path, {"device": "a large machine"}).add({"benchmark": "step overhead"}, {})
    before = path.read_bytes()
    assert main(["--file", str(path)]) == 1
    assert capsys.readouterr().err == (
        f"The benchmark stopped: {path} has rows of device a large machine, this run's is "
        f"{provenance()['device']}: --fresh drops them, --file names another file.\n"
    )
    assert path.read_bytes() == before


def test_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cpu.jsonl"
    for content in (None, '{"key": {"benchm'):  # killed within its first row
        if content is not None:
            path.write_text(content)
        assert main(["report", "--file", str(path)]) == 1
        said = f"The benchmark stopped: no results in {path}, measure first.\n"
        assert capsys.readouterr().err == said


def test_half_a_row_is_cut_before_the_next(tmp_path: Path) -> None:
    """Also within a character of several bytes, and not in a file that is refused."""
    path = tmp_path / "rows.jsonl"
    Results(path).add({"number": 0}, {"said": "é"})
    whole = path.read_bytes()
    torn = whole + '{"key": {"number": 1}, "said": "é'.encode()[:-1]
    path.write_bytes(torn)
    assert len(read(path)) == 1
    with pytest.raises(ValueError, match="has rows of threads"):
        Results(path, {"threads": "12"})
    assert path.read_bytes() == torn
    results = Results(path)
    assert path.read_bytes() == whole
    results.add({"number": 1}, {})
    results.add({"number": 1}, {"said": "not written"})
    assert [row["key"]["number"] for row in read(path)] == [0, 1] and "said" not in read(path)[1]


def test_a_packed_file_is_read_where_it_is_and_unpacked_to_be_continued(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    Results(path).add({"number": 0}, {})
    rows, whole = read(path), path.read_bytes()
    packed = path.with_name("rows.jsonl.gz")
    packed.write_bytes(gzip.compress(whole))
    path.write_bytes(b"")
    assert stored(path) == path and read(path) == [], "what a run is writing comes first"
    path.unlink()
    assert stored(path) == packed and read(path) == rows
    for _ in range(2):
        unpack(path)
        assert path.read_bytes() == whole and [*tmp_path.iterdir()] == [path]
    path.unlink()
    packed.write_bytes(gzip.compress(whole)[:-9])
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz cannot be unpacked"):
        unpack(path)
    assert [*tmp_path.iterdir()] == [packed]


def test_no_file_of_the_repository_is_large() -> None:
    """A checkout stays below 64 MiB; `gzip -9n` packs rows to a sixteenth."""
    listed = git("ls-files", "-z")
    if not listed:
        pytest.skip("not a git checkout")
    sizes = {name: (ROOT / name).stat().st_size for name in listed.split("\0") if name}
    assert not {name: size for name, size in sizes.items() if size > 8 << 20}
    assert sum(sizes.values()) < 64 << 20
