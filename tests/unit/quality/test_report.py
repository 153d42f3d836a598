# SPDX-License-Identifier: Apache-2.0
"""Tables from rows: the figures, the samples they share, the intervals, and the page they go to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.documents.questions import evaluation_set
from benchmarks.quality.__main__ import main
from benchmarks.quality.report import BEGIN, END, PAGE, PAPER, report
from benchmarks.quality.scores import Scores, difference, total
from benchmarks.quality.settings import (
    FULL,
    ONE_TOKEN,
    POLICIES,
    PRUNING,
    RANKS,
    Setting,
    grid,
    rare,
)

RUN = {
    "run": 1,
    **{"model": "m", "weights": "w", "version": "1", "sglang": "s", "torch": "t"},
    **{"device": "d", "git": "g", "command": "c"},
}


def row(
    setting: Setting,
    number: int,
    score: float,
    *,
    kind: str = "value",
    sample: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    sample = sample or f"{kind}{number}"
    key = {"dataset": "ours", "kind": kind, "sample": sample, "setting": setting.key()}
    report = {"columns": 1} if setting.compresses else {}
    fixed = {"run": 1, "answer": "", "metric": "exact_match", "group": sample}
    return {"key": key, **fixed, "seconds": 0.1, "score": score, **report, **more}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in (RUN, *rows)))
    return path


def printed(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nwhat was there\n{END}\nafter\n")
    report(write(tmp_path / "rows.jsonl", rows), page)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n")
    assert "what was there" not in text
    return text


AIR, SNAP = Setting.of("aircache", 0.01), Setting.of("snapkv", 0.01)


def test_a_table_compares_what_all_have_answered(tmp_path: Path) -> None:
    """AirCache has 3 of 4 right, SnapKV 1 of 4; the fifth sample only AirCache has answered."""
    rows = [row(Setting.of(FULL), i, 1.0) for i in range(5)]
    rows += [row(AIR, i, float(i != 0)) for i in range(5)]
    rows += [row(SNAP, i, float(i == 3)) for i in range(4)]
    text = printed(tmp_path, rows)
    assert "4 samples, all kinds" in text
    assert "| full cache | 100.0 |" in text
    assert "| AirCache | 75.0 |" in text and "| SnapKV | 25.0 |" in text
    assert "Goal met: AirCache at 1 % at least 6.5 points above SnapKV (+50.0)" in text
    assert (
        "Goal met: AirCache first, or level, of 2 policies at 1 % (75.0, the best other is SnapKV"
        in text
    )
    # The paper's row for Qwen2-VL-7B: (75.9 + 70.7 + 78.3 + 68.6) / 4.
    assert "| AirCache | 73.4 |" in text


def test_anls_of_our_documents(tmp_path: Path) -> None:
    """The answer as it stands on the page, one with a character too many, and none of it."""
    questions = evaluation_set("value", 3)
    said = (questions[0].answer, questions[1].answer + "X", "")
    rows = [
        row(Setting.of(FULL), i, float(i == 0), answer=text, sample=question.id)
        for i, (question, text) in enumerate(zip(questions, said, strict=True))
    ]
    near = 1 - 1 / (len(questions[1].answer) + 1)
    assert f"| `value` | 3 | 33.3 | {100 * (1 + near) / 3:.1f} |" in printed(tmp_path, rows)


def test_goals_can_be_missed(tmp_path: Path) -> None:
    ten = Setting.of("aircache", 0.1)
    rows = [row(Setting.of(FULL), i, 1.0) for i in range(50)]
    rows += [row(ten, i, float(i > 0)) for i in range(50)]
    rows += [row(Setting.of("h2o", 0.1), i, 1.0) for i in range(50)]
    text = printed(tmp_path, rows)
    assert "Goal **missed**: AirCache at 10 % within 1 point of the full cache (-2.0)" in text
    assert (
        "Goal **missed**: AirCache first, or level, of 2 policies at 10 % (98.0, the best other"
        in text
    )


def test_the_interval_is_of_paired_differences() -> None:
    """Where both have the same scores nothing varies, however much the scores do."""
    rows = [row(s, i, float(i % 2)) for s in (AIR, SNAP) for i in range(40)]
    assert difference(Scores(rows), AIR, SNAP) == (0.0, 0.0, 0.0)
    rows = [row(AIR, i, 1.0) for i in range(100)] + [
        row(SNAP, i, float(i < 90)) for i in range(100)
    ]
    gap = difference(Scores(rows), AIR, SNAP)
    assert gap is not None and gap[0] == pytest.approx(10)
    # 1.96 * sqrt(0.1 * 0.9 / 100) is 5.9 points.
    assert gap[1] == pytest.approx(4.1, abs=1) and gap[2] == pytest.approx(15.9, abs=1.2)


def test_totals_of_groups_and_of_mme() -> None:
    choice = [row(AIR, i, float(i != 1), metric="choice", group=f"{i // 2}") for i in range(4)]
    assert total(choice) == 50.0
    mme = [row(AIR, i, float(i != 1), metric="yes_no", group=f"{i // 2}") for i in range(4)]
    assert total(mme) == 75.0 + 50.0


def test_every_grid_has_its_table(tmp_path: Path) -> None:
    """Rows of all grids, and the heading and a figure of each table."""
    settings = {
        setting
        for name in (
            "table1",
            "table4",
            "table5",
            "table6",
            "table11",
            "similar",
            "pooling",
            "table12",
            "table13",
            "budget",
            "floor",
            "heads",
            "cross",
        )
        for setting in grid(name, POLICIES, None)
    } | {*grid("figure4", POLICIES, None)}
    budgets = {"uniform": [4, 4], "strength": [6, 2], "skewness": [4, 4]}
    rows = [
        row(
            *(setting, i, 1.0),
            kind=kind,
            answer="ABC",
            layer_budgets=budgets.get(dict(setting.knobs).get("budget", ""), [5, 3]),
            visual_mass=0.75,
            divergence=0.125,
            same=3,
        )
        for setting in sorted(settings, key=str)
        for kind in ("value", "line")
        for i in range(2)
    ]
    text = printed(tmp_path, rows)
    for heading in (
        "Policies by retention",
        "Observation window (table 5)",
        "Layer budgets (table 5)",
        "Even share under budgets from one threshold",
        "Share merged instead of dropped (table 11)",
        "Share merged into the most similar keys",
        "Width of SnapKV's pool",
        "Relevance threshold (table 12)",
        "Heads, which the paper leaves open",
        "Every window with every budget at 10 %, 4 samples",
        "One visual token a layer, by its rank (figure 4), 4 samples",
        "How far the next token's distribution moves",
        "Attention mass",
        "Divergence between layer budgets (table 13)",
        "Token pruning (table 4), 4 samples",
        "Evicting text too (table 6), 4 samples",
    ):
        assert f"### {heading}" in text
    assert "Kind `line`, 2 samples" in text
    assert "| AirCache, one threshold | 100.0 | 100.0 | 100.0 | 100.0 | 100.0 |" in text
    assert f"| AirCache, one threshold |{' +0.0 (+0.0 to +0.0) |' * 5}" in text
    # (72.2 + 58.4 + 65.7 + 57.0) / 4; the windows are asked at four retentions, the paper's at 1 %
    assert "| all | 100.0 | 100.0 | 100.0 | 100.0 | 63.3 |" in text
    assert "| last-1 | 100.0 | 100.0 | 100.0 | 100.0 | - |" in text
    ranked = text.partition("(figure 4)")[2]
    for figure in ("100.0", "3.00", "0.1250", "0.7500"):
        assert f"| AirCache |{f' {figure} |' * len(RANKS)}" in ranked
    assert "| uniform, strength | 0.0488 | 0.55 | 0.0488 | 0.58 |" in text
    assert "| uniform, skewness | 0.0000 | 0.54 |" in text
    assert f"| AirCache, all |{' 100.0 / 3.0 |' * 4} 75.8 / 374 | 53.4 / 530 |" in text
    assert "The full cache: 100.0 / 3.0." in text
    assert "| FastV | 100.0 | 100.0 | 100.0 | 73.6 | 47.7 | 16.9 |" in text
    assert "| SnapKV | 0.1250 (4) |" in text and "| SnapKV | 0.7500 (4) |" in text
    assert "were to be compressed" not in text
    for name in ("rows-ours", "rows-ours-ranks"):
        assert f"![{name}]({name}.png)" in text
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_an_older_revision_are_left_out(tmp_path: Path) -> None:
    rows = [row(AIR, 0, 1.0), row(Setting.of("elastic", 0.01), 0, 1.0)]
    rows.append(row(Setting.of("prefixkv", 0.01), 0, 1.0))
    del rows[-1]["key"]["setting"]["revision"]
    text = printed(tmp_path, rows)
    assert "2 answers in" in text and "| Elastic Cache | 100.0 |" in text
    assert "| PrefixKV | 100.0 |" not in text


def test_an_answer_that_was_not_compressed_is_said(tmp_path: Path) -> None:
    rows = [row(AIR, 0, 1.0), row(SNAP, 0, 1.0)]
    del rows[0]["columns"]
    assert "**1 answers were to be compressed and were not.**" in printed(tmp_path, rows)


def test_what_cannot_be_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run first"):
        report(tmp_path / "none.jsonl")
    (tmp_path / "page.md").write_text("no marks")
    with pytest.raises(ValueError, match="must have <!-- results: begin -->"):
        report(write(tmp_path / "rows.jsonl", [row(AIR, 0, 1.0)]), tmp_path / "page.md")
    assert BEGIN in PAGE.read_text() and END in PAGE.read_text()


def test_the_command_writes_to_the_page_that_it_names(tmp_path: Path) -> None:
    page, rows = tmp_path / "page.md", write(tmp_path / "rows.jsonl", [row(AIR, 0, 1.0)])
    page.write_text(f"{BEGIN}\n{END}\n")
    before = PAGE.read_text()
    assert main(["report", "--file", str(rows), "--page", str(page)]) == 0
    assert "1 answers in" in page.read_text() and PAGE.read_text() == before


def test_the_papers_figures() -> None:
    """Spot checks against the paper's text, and the goal's own arithmetic: 6.5 points at 1 %."""
    ours, snap = (PAPER["table1"]["LLaVA-OV-7B"][p]["0.01"] for p in ("aircache", "snapkv"))
    assert sum(ours.values()) / 4 - sum(snap.values()) / 4 == pytest.approx(6.55)
    assert PAPER["table12"]["0.9"]["0.01"] == ours == PAPER["table11"]["0"]["0.01"]
    assert PAPER["table5"]["aircache"]["0.01"] == ours
    assert {*PAPER["table4"]} == {FULL, "aircache", *PRUNING}
    assert Setting.of("aircache", ONE_TOKEN, **rare(rank=0)).key()["ablation"] == {"rank": 0}
