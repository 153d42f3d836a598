# SPDX-License-Identifier: Apache-2.0
"""Published data sets, read from where their archives were unpacked; nothing is downloaded.

| name | folder | read |
|---|---|---|
| docvqa | of `*val_v1.0*.json` (`val_v1.0_withQT.json`) | `documents/` or `spdocvqa_images/` |
| infovqa | of `infographicsVQA_val_v1.0*.json` | any subfolder with the pictures |
| textvqa | of `TextVQA_0.5.1_val.json` | `train_images/` |
| chartqa | one split (`test/`) | `*_human.json`, `*_augmented.json`, `png/` |
| mmbench | of one `*.tsv`, or the file | pictures inside, base64 |
| mme | of the tasks' folders | `*.txt` beside pictures, or in `questions_answers_YN/`, `images/` |
| mmbench-video | of `MMBench-Video.tsv` | `video/*.mp4` |

Prompts are those of VLMEvalKit, which the paper's figures come from.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.quality.samples import Sample, data_url

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
PICTURES = (".jpg", ".jpeg", ".png")
ROTATION = 1_000_000  # MMBench: index % ROTATION is the question, the rest the rotation


def docvqa(root: Path) -> Iterator[Sample]:
    """Mathew et al. 2021 (arXiv 2007.00398), single documents."""
    file = _only(root, "*val_v1.0*.json")
    for row in _data(file):
        answers, name = _fields(file, row, "answers", "image")
        yield _vqa(file, "docvqa", row, "questionId", answers, Path(name).name, "anls")


def infovqa(root: Path) -> Iterator[Sample]:
    """Mathew et al. 2022 (arXiv 2104.12756)."""
    file = _only(root, "*val_v1.0*.json")
    for row in _data(file):
        answers, name = _fields(file, row, "answers", "image_local_name")
        yield _vqa(file, "infovqa", row, "questionId", answers, name, "anls")


def textvqa(root: Path) -> Iterator[Sample]:
    """Singh et al. 2019 (arXiv 1904.08920)."""
    file = _only(root, "TextVQA_*_val.json")
    for row in _data(file):
        answers, image = _fields(file, row, "answers", "image_id")
        yield _vqa(file, "textvqa", row, "question_id", answers, f"{image}.jpg", "vqa_accuracy")


def chartqa(root: Path) -> Iterator[Sample]:
    """Masry et al. 2022 (arXiv 2203.10244); questions of people and of a machine are two kinds."""
    for kind in ("human", "augmented"):
        file = _only(root, f"*_{kind}.json")
        for number, row in enumerate(_json(file)):
            question, label, name = _fields(file, row, "query", "label", "imgname")
            picture = _picture(file, Path("png") / name)
            yield Sample(
                *("chartqa", kind, f"{kind}-{number}", question + SHORT, (str(label),)),
                "relaxed_accuracy",
                pictures=lambda picture=picture: [data_url(picture)],
            )


def mmbench(path: Path) -> Iterator[Sample]:
    """Liu et al. 2023 (arXiv 2307.06281); a question counts if all its rotations are right."""
    file = path if path.is_file() else _only(path, "*.tsv")
    rows = {row["index"]: row for row in _tsv(file, "index", "question", "A", "B", "image")}
    for index, row in rows.items():
        options = {key: row[key] for key in "ABCDEFGH" if row.get(key) not in (None, "", "nan")}
        (answer,) = _fields(file, row, "answer")
        if answer not in options:
            raise ValueError(f"{file}: row {index} has no answer among its options, got {answer!r}")
        hint = row.get("hint") or ""
        lines = [f"Hint: {hint}"] if hint not in ("", "nan") else []
        lines += [f"Question: {row['question']}", "Options:"]
        lines += [f"{key}. {option}" for key, option in options.items()]
        image = row["image"]
        if len(image) <= 64:  # the index of the row that has the picture
            if image not in rows:
                raise ValueError(f"{file}: row {index} has the picture of {image!r}, not a row")
            image = rows[image]["image"]
        kind = "image/png" if image.startswith("iVBOR") else "image/jpeg"
        yield Sample(
            *("mmbench", row.get("l2-category") or row.get("category") or "all", index),
            *("\n".join([*lines, LETTER]), (answer,), "choice"),
            pictures=lambda url=f"data:{kind};base64,{image}": [url],
            group=str(int(index) % ROTATION),
            options=options,
        )


def mme(root: Path) -> Iterator[Sample]:
    """Fu et al. 2023 (arXiv 2306.13394): two yes-or-no questions on each picture of 14 tasks."""
    files = sorted([*root.glob("*/*.txt"), *root.glob("*/questions_answers_YN/*.txt")])
    if not files:
        raise ValueError(f"{root} has no TASK/*.txt and no TASK/questions_answers_YN/*.txt")
    for file in files:
        task = file.relative_to(root).parts[0]
        folder = root / task / "images" if file.parent.name != task else file.parent
        picture = next(filter(Path.exists, (folder / (file.stem + s) for s in PICTURES)), None)
        if picture is None:
            raise ValueError(f"{file} has no picture {file.stem}.jpg or .png in {folder}")
        for number, line in enumerate(filter(None, file.read_text("utf-8").splitlines())):
            question, tab, answer = line.rpartition("\t")
            if not tab or answer.strip() not in ("Yes", "No"):
                raise ValueError(f"{file}: a line must end in a tab and Yes or No, got {line!r}")
            yield Sample(
                *("mme", task, f"{task}/{file.stem}/{number}", question, (answer.strip(),)),
                "yes_no",
                pictures=lambda picture=picture: [data_url(picture)],
                group=f"{task}/{file.stem}",
            )


def mmbench_video(root: Path) -> Iterator[Sample]:
    """Fang et al. 2024 (arXiv 2406.14515). Graded by a language model; ANLS is a stand-in.

    The videos are published pickled; VLMEvalKit's unwrap writes them to `video/`.
    """
    file = _only(root, "MMBench-Video.tsv")
    for row in _tsv(file, "index", "question", "answer", "video_path"):
        video = root / row["video_path"]
        if not video.is_file():
            raise ValueError(f"{file} names {video}, which does not exist")
        yield Sample(
            *("mmbench-video", "all", row["index"], row["question"], (row["answer"],), "anls"),
            video=video,
            max_tokens=128,
        )


LAYOUTS: dict[str, Callable[[Path], Iterator[Sample]]] = {
    "docvqa": docvqa,
    "chartqa": chartqa,
    "infovqa": infovqa,
    "textvqa": textvqa,
    "mmbench": mmbench,
    "mme": mme,
    "mmbench-video": mmbench_video,
}


def _vqa(
    file: Path, name: str, row: Any, key: str, answers: Any, picture: str, metric: str
) -> Sample:
    question, number = _fields(file, row, "question", key)
    found = _picture(file, Path(picture))
    return Sample(
        *(name, "val", str(number), question + SHORT, tuple(answers), metric),
        pictures=lambda: [data_url(found)],
    )


def _only(root: Path, pattern: str) -> Path:
    found = sorted(root.glob(pattern))
    if len(found) != 1:
        got = "none" if not found else ", ".join(file.name for file in found)
        raise ValueError(f"{root} must hold one {pattern}, got {got}")
    return found[0]


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None


def _data(file: Path) -> list[Any]:
    content = _json(file)
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise ValueError(f'{file} must be an object with a list "data"')
    return content["data"]


def _tsv(file: Path, *columns: str) -> Iterator[dict[str, str]]:
    csv.field_size_limit(sys.maxsize)  # a picture is one field
    with file.open(encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(lines, delimiter="\t")
        missing = [name for name in columns if name not in (rows.fieldnames or ())]
        if missing:
            raise ValueError(f"{file} has no column {', '.join(missing)}")
        yield from rows


def _fields(file: Path, row: Any, *names: str) -> tuple[Any, ...]:
    missing = [name for name in names if not isinstance(row, dict) or row.get(name) is None]
    if missing:
        raise ValueError(f"{file} has a row without {', '.join(missing)}")
    return tuple(row[name] for name in names)


def _picture(file: Path, name: Path) -> Path:
    """The picture beside the annotations, or in any folder there."""
    root = file.parent
    for found in (root / name, *sorted(root.glob(f"*/{name}"))):
        if found.is_file():
            return found
    raise ValueError(f"{file} names {name}, which is not in {root} or a folder of it")
