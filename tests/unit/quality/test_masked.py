# SPDX-License-Identifier: Apache-2.0
"""How the lab's masks split cells among heads, and mix what two selections keep."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.documents.questions import evaluation_set
from benchmarks.quality.masked import (
    ASKED,
    FILE,
    by_reading,
    cells_by_head,
    mixed,
    of_heads,
    report,
    where,
)
from benchmarks.records import ROOT, Results

L, H_KV, N_V = 3, 4, 20


def test_heads_of_a_layer_share_its_cells_by_their_highest_scores() -> None:
    scores = torch.rand((L, H_KV, N_V), generator=torch.Generator().manual_seed(1))
    scores[1, 2] += 1  # one head has all the highest
    counts = of_heads(scores, torch.tensor([5, 5, 2]))
    assert counts.sum(dim=1).tolist() == [20, 20, 8]
    # Its 20 cells, of which a fifth goes to all four.
    assert counts[1].tolist() == [1, 1, 17, 1]
    assert (counts >= 1).all() and (counts <= N_V).all()


@pytest.mark.parametrize("m", [1, 3, 10])
def test_heads_that_read_get_more_of_all_layers(m: int) -> None:
    heads = torch.zeros(L, H_KV)
    heads[0, 1], heads[2, 3] = 3.0, 1.0
    counts = by_reading(heads, N_V, m)
    assert counts.sum() == L * H_KV * m
    assert counts[0, 1] == counts.max() and (counts >= 1).all() and (counts <= N_V).all()


def test_the_highest_cells_stay() -> None:
    scores = torch.tensor([[[0.1, 0.9, 0.5], [0.3, 0.3, 0.2]]])
    assert cells_by_head(scores, torch.tensor([[2, 1]])) == [[[1, 2], [0]]]


def test_text_of_one_selection_and_pictures_of_another() -> None:
    few, many = [[[0, 2]]], [[[0, 1, 2, 3]]]
    assert mixed(few, many, frozenset({2, 3})) == [[[0, 2, 3]]]
    assert mixed(many, few, frozenset({2, 3})) == [[[0, 1, 2]]]


@pytest.mark.parametrize("kind", ASKED)
def test_where_an_answer_stands(kind: str) -> None:
    for question in evaluation_set(kind, 20):
        page = "".join(question.sheets[0].text)
        cells, beside = where(question)
        assert "".join(page[i] for i in cells) == question.answer
        assert set(beside) >= set(cells) and len(beside) in (len(cells) + 1, len(cells) + 2)
        assert len(beside) <= 0.055 * len(page)


def test_the_report_compares_in_pairs(tmp_path: Path) -> None:
    """Both methods are right once; only pairs say that they part on both samples."""
    results = Results(tmp_path / "rows.jsonl", {"model": "none"})
    for sample, ours in enumerate((True, False)):
        right = {
            "full cache": {"1.0": True},
            "aircache": {"0.1": ours, "0.05": ours},
            "other": {"0.1": not ours, "0.05": ours},
        }
        results.measure({"sample": str(sample)}, partial(dict, right=right))
    lines = report(tmp_path / "rows.jsonl").splitlines()
    assert "| other | - | - | 50.0 | 50.0 | - | - |" in lines
    assert "| other | - | +0.0 (-100.0 to +100.0) | 0 | - | - |" in lines


@pytest.mark.parametrize(
    ("rows", "page"),
    [(FILE, "quality.md"), (FILE.with_name("quality-masked-plain.jsonl"), "quality-plain.md")],
)
def test_the_page_has_the_table(rows: Path, page: str) -> None:
    table = report(rows).split("\n\n", 1)[1]
    assert table.strip() in (ROOT / "docs" / page).read_text()
