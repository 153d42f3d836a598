# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/bench_sharing.py writes, and how it judges its goals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aircache_sglang.testing.prompts import Prompt, user_prompt
from benchmarks.bench_sharing import PICTURE_SIDE, Workload, goals, replace
from benchmarks.records import Row, read


def row(cache: str, part: str, reuse: str | None = None, **figures: int) -> Row:
    return {"key": {"part": part, "cache": cache, "reuse": reuse}, **figures}


def test_a_row_replaces_the_one_of_its_key(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    for figure in (1, 2):
        for part in ("questions", "chats"):
            replace(path, row("stock", part, figure=figure))
    assert [(one["key"]["part"], one["figure"]) for one in read(path)] == [
        ("questions", 2),
        ("chats", 2),
    ]


@pytest.mark.parametrize("met", [True, False])
def test_goals(met: bool) -> None:
    off = 0 if met else 1
    rows = [
        {"key": {"part": "pin", "share": 0.5}},
        row("stock", "shared", hit_tokens_before=50, held_at_once=7),
        row("ours", "shared", "exact", hit_tokens_before=50 - off, held_at_once=21 - off),
        row("stock", "chats", hit_tokens_before=9, prefilled_tokens=1000),
        row("ours", "chats", "compressed", hit_tokens_before=9 - off, prefilled_tokens=99 + off),
        # Without stock's row nothing can be said.
        row("ours", "mixed", "exact", hit_tokens_before=0),
    ]
    judged = goals(rows)
    assert [verdict for _, verdict in judged] == [met] * 4
    assert "shared, exact: 3 times as many requests at once" in judged[1][0]


def test_hits_are_told_apart_by_where_they_stand() -> None:
    answers: list[Any] = []

    def generate(*_: Any, **__: Any) -> Any:
        return {"meta_info": answers.pop(0)}

    server: Any = SimpleNamespace(generate=generate)
    load = Workload(server, "exact", lambda text: len(text.split()))
    picture: Any = object()
    visual = PICTURE_SIDE**2
    prompt = Prompt("a b c <|image_pad|> d e", (picture,))
    for hit in (2, 3 + visual, 3 + visual + 1):
        info = {"prompt_tokens": 3 + visual + 2, "cached_tokens": hit, "completion_tokens": 1}
        answers.append({**info, "aircache": {"columns": 40}})
        load.ask(prompt, 1)
    answers.append({"prompt_tokens": 9, "cached_tokens": 4, "completion_tokens": 1})
    load.ask(user_prompt("only text"), 1)
    assert [one["hit_before"] for one in load.rows] == [2, 3, 3, 4]
    assert [one["hit_behind"] for one in load.rows] == [0, 0, 1, 0]
    answers.append({**info, "aircache": {"left_alone": "no_gain"}})
    with pytest.raises(RuntimeError, match="not compressed"):
        load.ask(prompt, 1)
