# SPDX-License-Identifier: Apache-2.0
"""Result files: what may be continued, and what is said where it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.records import Results, provenance, read


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
