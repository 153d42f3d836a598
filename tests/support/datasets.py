# SPDX-License-Identifier: Apache-2.0
"""A few made-up samples in the layouts in which the data sets are published."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path
from typing import Any

from PIL import Image

SIZE = (280, 224)  # 80 visual tokens of Qwen2-VL


def draw(path: Path, number: int) -> Path:
    """A picture of one colour; JPEG or PNG by its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE, (40 * number % 256, 90, 200 - 30 * number % 200)).save(path)
    return path


def make_docvqa(root: Path) -> Path:
    """Two questions on one page, one on another; the pictures where the JSON says."""
    rows = []
    for i, answers in enumerate((["0.28"], ["March 1998", "mar. 1998"], ["Ann Lee"])):
        name = f"documents/abcd{i // 2:04}_1.png"
        draw(root / name, i // 2)
        rows.append(
            {
                "questionId": 49153 + i,
                "question": f"What is written in line {i}?",
                "question_types": ["form"],
                "image": name,
                "docId": 14465 + i // 2,
                "ucsf_document_id": f"abcd{i // 2:04}",
                "ucsf_document_page_no": "1",
                "answers": answers,
                "data_split": "val",
            }
        )
    head = {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": "val"}
    return write_json(root, "val_v1.0_withQT.json", {**head, "data": rows})


def make_infovqa(root: Path) -> Path:
    rows = []
    for i in range(2):
        draw(root / "infographicsvqa_images" / f"{30000 + i}.jpeg", i)
        rows.append(
            {
                "questionId": 98313 + i,
                "question": "Which platform is for planning?",
                "image_local_name": f"{30000 + i}.jpeg",
                "image_url": f"https://example.org/{i}.jpeg",
                "ocr_output_file": f"{30000 + i}.json",
                "answers": ["pinterest"],
                "data_split": "val",
            }
        )
    head = {"dataset_name": "infographicVQA", "dataset_version": "1.0", "dataset_split": "val"}
    return write_json(root, "infographicsVQA_val_v1.0_withQT.json", {**head, "data": rows})


def make_textvqa(root: Path) -> Path:
    draw(root / "train_images" / "003a8ae2ef43b901.jpg", 1)
    row = {
        "image_id": "003a8ae2ef43b901",
        "question": "what is the brand of this camera?",
        "question_id": 34602,
        "image_classes": ["Cassette deck"],
        "answers": ["dakota"] * 7 + ["dakota digital"] * 3,
        "set_name": "val",
    }
    return write_json(root, "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [row]})


def make_chartqa(root: Path) -> Path:
    for kind, label in (("human", "14"), ("augmented", "Yes")):
        draw(root / "png" / f"{kind}.png", len(kind))
        rows = [{"imgname": f"{kind}.png", "query": "How many bars?", "label": label}]
        write_json(root, f"test_{kind}.json", rows)
    return root


def make_mmbench(root: Path) -> Path:
    """One question in two rotations, the second with the first's picture; one with a hint."""
    picture = base64.b64encode(draw(root / "picture.jpg", 3).read_bytes()).decode()
    head = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    head += ["source", "l2-category", "comment", "split"]
    kind = ["spatial", "x", "finegrained", "", "dev"]
    rows = [
        [241, "Where is the cat?", "", "left", "right", "", "", "A", kind[0], picture, *kind[1:]],
        [1000241, "Where is the cat?", "", "right", "left", "", "", "B", kind[0], "241", *kind[1:]],
        [252, "Which is it?", "A map.", "a", "b", "c", "d", "C", kind[0], picture, *kind[1:]],
    ]
    with (root / "MMBench_DEV_EN.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([head, *rows])
    (root / "picture.jpg").unlink()
    return root


def make_mme(root: Path) -> Path:
    """A task with its files side by side, and one with folders; both occur."""
    for task, text, pictures in (
        ("existence", "", ""),
        ("posters", "questions_answers_YN", "images"),
    ):
        for i in range(2):
            draw(root / task / pictures / f"{i:06}.jpg", i)
            lines = [f"Is there {thing}? Please answer yes or no." for thing in ("a dog", "a cat")]
            folder = root / task / text
            folder.mkdir(exist_ok=True)
            (folder / f"{i:06}.txt").write_text(f"{lines[0]}\tYes\n{lines[1]}\tNo\n")
    return root


def make_mmbench_video(root: Path) -> Path:
    """The video is an animated PNG, which the stand-in decoder of the tests reads."""
    (root / "video").mkdir(parents=True)
    frames = [Image.new("RGB", (112, 112), (60 * i, 80, 120)) for i in range(8)]
    with (root / "video" / "abc_processed.mp4").open("wb") as file:
        frames[0].save(file, "PNG", save_all=True, append_images=frames[1:], duration=250)
    head = ["index", "video", "video_type", "question", "answer", "dimensions", "video_path"]
    row = [0, "abc_processed", "News", "What moves?", "a car", "['Coarse Perception']"]
    with (root / "MMBench-Video.tsv").open("w", newline="") as file:
        rows = [head, [*row, "./video/abc_processed.mp4"]]
        csv.writer(file, delimiter="\t").writerows(rows)
    return root


def write_json(root: Path, name: str, content: Any) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(content))
    return root
