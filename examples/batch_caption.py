# SPDX-License-Identifier: Apache-2.0
"""Captions for a folder of pictures, inside this process; goes on where it was cut off.

    python -m examples.batch_caption CHECKPOINT FOLDER --out captions.jsonl

A picture that --out already has is skipped. Add `--device cpu` on a machine whose GPU must not be
used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from examples.engine_batch import answers, engine_of

KINDS = {".jpeg", ".jpg", ".png", ".webp"}


def captioned(out: Path) -> set[str]:
    """Names of the pictures that `out` has; drops a last line that was cut off."""
    if not out.exists():
        return set()
    text = out.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        out.write_text(whole)
    return {json.loads(line)["picture"] for line in whole.splitlines()}


def readable(picture: Path) -> bool:
    """Whether this is a whole picture: one that is not would fail its whole batch."""
    try:
        with Image.open(picture) as image:
            image.load()
    except OSError:
        return False
    return True


def batches(pictures: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    for first in range(0, len(pictures), size):
        yield pictures[first : first + size]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.batch_caption", description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("captions.jsonl"))
    parser.add_argument("--question", default="Describe this picture.")
    parser.add_argument("--retention", type=float, default=0.1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32, help="pictures between two saves")
    parser.add_argument("--device", help="SGLang's --device")
    arguments = parser.parse_args(argv)
    if arguments.batch < 1:
        parser.error(f"--batch must be at least 1, got {arguments.batch}")
    if not arguments.folder.is_dir():
        parser.error(f"{arguments.folder} is not a folder")
    if not arguments.out.parent.is_dir():
        parser.error(f"--out: {arguments.out.parent} is not a folder")

    known = captioned(arguments.out)
    found = sorted(path for path in arguments.folder.iterdir() if path.suffix.lower() in KINDS)
    pictures = [path for path in found if path.name not in known]
    print(f"{len(found)} pictures, {len(found) - len(pictures)} of them already captioned")
    if not pictures:
        return 0
    unreadable = [path for path in pictures if not readable(path)]
    for path in unreadable:
        print(f"skipped, not a whole picture: {path}", file=sys.stderr)
    pictures = [path for path in pictures if path not in unreadable]

    with (
        # First, so that a file that cannot be written costs no start of the engine.
        arguments.out.open("a") as out,
        engine_of(arguments.checkpoint, arguments.retention, arguments.device) as engine,
        tqdm(total=len(pictures), unit="picture") as bar,
    ):
        for batch in batches(pictures, arguments.batch):
            found_answers = answers(
                engine, [str(path) for path in batch], arguments.question, arguments.tokens
            )
            for path, answer in zip(batch, found_answers, strict=True):
                report = answer["meta_info"]["aircache"]
                row = {"picture": path.name, "caption": answer["text"], "aircache": report}
                out.write(json.dumps(row) + "\n")
            out.flush()
            bar.update(len(batch))
    return 1 if unreadable else 0


# The engine starts processes that import this module anew.
if __name__ == "__main__":
    sys.exit(main())
