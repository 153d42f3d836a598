# SPDX-License-Identifier: Apache-2.0
"""Loaders of the published layouts, on made-up samples in them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.documents.questions import KINDS
from benchmarks.quality import datasets
from benchmarks.quality.__main__ import of_kinds
from benchmarks.quality.layouts import LAYOUTS
from tests.support import datasets as made

MAKE = {name: getattr(made, "make_" + name.replace("-", "_")) for name in LAYOUTS}
EXPECTED = {
    "docvqa": [("val", "49153", "anls"), ("val", "49154", "anls")],
    "infovqa": [("val", "98313", "anls")],
    "textvqa": [("val", "34602", "vqa_accuracy")],
    "chartqa": [
        ("human", "human-0", "relaxed_accuracy"),
        ("augmented", "augmented-0", "relaxed_accuracy"),
    ],
    "mmbench": [
        ("finegrained", "241", "choice"),
        ("finegrained", "1000241", "choice"),
        ("finegrained", "252", "choice"),
    ],
    "mme": [
        ("existence", "existence/000000/0", "yes_no"),
        ("existence", "existence/000000/1", "yes_no"),
    ],
    "mmbench-video": [("all", "0", "anls")],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_samples(name: str, tmp_path: Path) -> None:
    samples = datasets.load(name, MAKE[name](tmp_path), None)
    assert {*EXPECTED[name]} <= {(s.kind, s.id, s.metric) for s in samples}
    assert len({s.id for s in samples}) == len(samples)
    for sample in samples:
        assert sample.dataset == name and sample.prompt
        right = sample.answers[0]
        assert sample.score(right) == pytest.approx(1.0)
        if name == "mmbench-video":
            assert sample.video is not None and sample.pictures() == []
            continue
        (url,) = sample.pictures()
        head, _, data = url.partition(",")
        assert head in ("data:image/png;base64", "data:image/jpeg;base64")
        with Image.open(made_file(base64.b64decode(data), tmp_path)) as image:
            assert image.size == made.SIZE and f"image/{image.format.lower()}" in head


def test_any_answer_of_several_counts(tmp_path: Path) -> None:
    sample = datasets.load("docvqa", made.make_docvqa(tmp_path), None)[1]
    assert sample.score("mar 1998") == pytest.approx(1 - 1 / 9)


def made_file(content: bytes, folder: Path) -> Path:
    path = folder / "sent"
    path.write_bytes(content)
    return path


def test_groups_are_counted_and_kept_whole(tmp_path: Path) -> None:
    mmbench = datasets.load("mmbench", made.make_mmbench(tmp_path / "a"), 1)
    assert [s.id for s in mmbench] == ["241", "1000241"] and {s.group for s in mmbench} == {"241"}
    mme = datasets.load("mme", made.make_mme(tmp_path / "b"), 1)
    assert [s.group for s in mme] == ["existence/000000"] * 2 + ["posters/000000"] * 2


def test_mmbench_prompt(tmp_path: Path) -> None:
    prompt = datasets.load("mmbench", made.make_mmbench(tmp_path), None)[2].prompt
    assert prompt == (
        "Hint: A map.\nQuestion: Which is it?\nOptions:\nA. a\nB. b\nC. c\nD. d\n"
        "Answer with the option's letter from the given choices directly."
    )


def edit(name: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        content = json.loads((root / name).read_text())
        change(content)
        (root / name).write_text(json.dumps(content))

    return apply


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("docvqa", lambda root: (root / "val_v1.0_withQT.json").unlink(), "one .*val.*got none"),
        ("docvqa", lambda root: (root / "val_v1.0_withQT.json").write_text("{"), "is not JSON"),
        (
            "docvqa",
            edit("val_v1.0_withQT.json", lambda c: c["data"][0].pop("answers")),
            "withQT.json has a row without answers",
        ),
        ("docvqa", edit("val_v1.0_withQT.json", lambda c: c.pop("data")), 'a list "data"'),
        (
            "infovqa",
            lambda root: (root / "infographicsvqa_images" / "30001.jpeg").unlink(),
            "names 30001.jpeg, which is not in",
        ),
        (
            "chartqa",
            lambda root: (root / "test_human.json").unlink(),
            "one .*_human.json, got none",
        ),
        (
            "mmbench",
            lambda root: (root / "MMBench_DEV_EN.tsv").write_text("index\tA\n1\tx\n"),
            "has no column question, B, image",
        ),
        (
            "mme",
            lambda root: (root / "posters/images/000001.jpg").unlink(),
            "has no picture 000001",
        ),
        (
            "mme",
            lambda root: (root / "existence/000001.txt").write_text("Is it?\tmaybe\n"),
            "must end in a tab and Yes or No",
        ),
        (
            "mmbench-video",
            lambda root: (root / "video/abc_processed.mp4").unlink(),
            "which does not exist",
        ),
    ],
)
def test_what_is_not_as_published(
    name: str, spoil: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    spoil(MAKE[name](tmp_path))
    with pytest.raises(ValueError, match=message) as raised:
        datasets.load(name, tmp_path, None)
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


def test_what_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one of ours, docvqa, .*, got 'vqav2'"):
        datasets.load("vqav2", tmp_path, None)
    with pytest.raises(ValueError, match="name its folder with --path"):
        datasets.load("mme", None, None)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        datasets.load("mme", tmp_path / "nowhere", None)


def test_of_kinds() -> None:
    samples = datasets.load("ours", None, 2)
    assert of_kinds(samples, None) == samples
    assert [s.kind for s in of_kinds(samples, ["line", "value"])] == ["value"] * 2 + ["line"] * 2
    with pytest.raises(ValueError, match="--kinds must be of value, line, cell, page, got 'lines'"):
        of_kinds(samples, ["lines"])


def test_ours(tmp_path: Path) -> None:
    samples = datasets.load("ours", None, 2)
    assert [s.kind for s in samples] == [kind for kind in KINDS for _ in range(2)]
    assert len({s.id for s in samples}) == len(samples)
    for sample in samples:
        assert sample.score(sample.answers[0]) == 1.0 and sample.score("?") == 0.0
        urls = sample.pictures()
        # Rendered anew with the same pixels.
        assert urls == sample.pictures() and len(urls) == (3 if sample.kind == "page" else 1)
        with Image.open(made_file(base64.b64decode(urls[0].partition(",")[2]), tmp_path)) as page:
            assert page.width * page.height >= 256 * 28 * 28
