# SPDX-License-Identifier: Apache-2.0
"""`aircache explain`: asks a running server and writes the page. Exit code 2 with one sentence."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aircache_sglang.explain.page import Comparison


def add_subcommand(subparsers: Any) -> None:
    """Add `explain` to an argparse sub-command list."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "explain",
        help="show on the picture what a running server keeps of it",
        description="Asks a running server once with all visual tokens and once per policy and "
        "retention, and writes one HTML file that needs no network (docs/audit.md).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--url", default="http://127.0.0.1:30000", help="the server (default: %(default)s)"
    )
    parser.add_argument("--api-key", help="the server's --api-key")
    several: dict[str, Any] = {"action": "append", "type": Path, "default": []}
    parser.add_argument("--image", **several, metavar="FILE", help="a picture; again for more")
    parser.add_argument("--video", **several, metavar="FILE", help="a video, behind the pictures")
    parser.add_argument("--ask", required=True, metavar="TEXT", help="the question")
    parser.add_argument(
        "--retention", default="0.1", metavar="R,...", help="shares to keep (default: %(default)s)"
    )
    parser.add_argument("--compare", default="", metavar="P,...", help="further policies")
    parser.add_argument("--max-tokens", type=int, default=32, metavar="N", help="of each answer")
    parser.add_argument(
        "--model-path", metavar="M", help="a copy of the server's checkpoint on this machine"
    )
    parser.add_argument(
        *("-o", "--output"),
        type=Path,
        default=Path("explain.html"),
        metavar="FILE",
        help="the page",
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="a still picture as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the data as well")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the files; returns the exit code."""
    try:
        comparison = compare(args)
        write(args, comparison)
    except (ValueError, OSError) as error:
        print(f"aircache explain: {one_line(error)}", file=sys.stderr)
        return 2
    for path in (args.output, args.png, args.json):
        if path is not None:
            print(path)
    if comparison.unplaced is not None:
        print(f"aircache explain: {comparison.unplaced}", file=sys.stderr)
    return 0


def one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def retentions_of(text: str) -> list[float]:
    """Numbers in (0, 1), comma-separated. Raises ValueError."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < share < 1 for share in found):
        raise ValueError(f"--retention must be numbers between 0 and 1, got {text!r}")
    return found


def compare(args: argparse.Namespace) -> Comparison:
    """Ask the server, and place what it kept. Raises ValueError and OSError."""
    from aircache_sglang.explain.client import Question, Server
    from aircache_sglang.explain.page import Comparison, Run

    retentions = retentions_of(args.retention)
    if not args.image and not args.video:
        raise ValueError("--image or --video is needed, since text alone is never dropped")
    if args.max_tokens < 2:
        raise ValueError(f"--max-tokens must be at least 2, got {args.max_tokens}")
    if args.png is not None and args.png == args.output:
        raise ValueError(f"--png and --output both name {args.png}")
    question = Question(args.ask, tuple(args.image), tuple(args.video), args.max_tokens)
    content = question.content()
    images = [(path.name, _opened(path)) for path in args.image]
    server = Server(args.url, args.api_key)
    policy, path = server.check()
    full = server.ask(content, args.max_tokens, policy="none")
    policies = dict.fromkeys([policy, *(name for name in args.compare.split(",") if name)])
    runs = []
    for name in policies:
        for retention in retentions:
            answer = server.ask(
                *(content, args.max_tokens),
                policy=name,
                retention=retention,
                gate="off",
                when="prefill",
                min_visual_tokens=1,
                return_selection=True,
            )
            runs.append(Run(name, retention, answer))
            if answer.report is None:
                raise ValueError(
                    f"the server dropped nothing at {name}, retention {retention:g}: "
                    f"{answer.reason or 'it saw no picture'}"
                )
    n_visual = int(runs[0].report["visual_tokens"])
    with quiet():
        panels, pictures, unplaced = _placed(args, args.model_path or path, images, n_visual)
    return Comparison(
        *(args.ask, path, args.url, full, tuple(runs), tuple(pictures), tuple(panels), unplaced),
        strip=bool(args.video) and unplaced is None,
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what SGLang and Transformers warn of when they are imported away from the terminal."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _opened(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a picture") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large: {error}") from error


def _placed(
    args: argparse.Namespace, path: str, images: list[Any], n_visual: int
) -> tuple[list[Any], list[Any], str | None]:
    """(panels, pictures, why there are no panels)."""
    from aircache_sglang.explain.geometry import GLM, Model, Unplaced, check_count, place_pictures

    try:
        model = Model.read(path)
        if model.architecture in GLM:
            from aircache_sglang.explain.frames import as_glm_reads

            images = [(each.name, as_glm_reads(each)) for each in args.image]
        pictures = list(images)
        panels = place_pictures(model, [picture for _, picture in images]) if images else []
        if args.video:
            from aircache_sglang.explain.frames import place_video

            for video in args.video:
                more, frames = place_video(model, video, len(pictures))
                panels, pictures = panels + more, pictures + frames
        check_count(panels, n_visual)
    except Unplaced as error:
        return [], images, str(error)
    except (ImportError, OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        return [], images, f"the tokens cannot be placed by the checkpoint at {path}: {said}"
    return panels, pictures, None


def write(args: argparse.Namespace, comparison: Comparison) -> None:
    """Raises OSError."""
    from aircache_sglang.explain.page import data_of, html_of, still_of

    for path in (args.output, args.png, args.json):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(html_of(comparison))
    if args.json is not None:
        args.json.write_text(json.dumps(data_of(comparison), indent=1) + "\n")
    if args.png is not None:
        if not comparison.panels:
            raise ValueError(f"{args.png} is not written: {comparison.unplaced}")
        still_of(comparison).save(args.png, format="PNG")
