# SPDX-License-Identifier: Apache-2.0
"""The repository's model, served by stock SGLang and with AirCache, reads the same invoice.

Run it from the repository's root with `make demo`. It needs no network and no GPU, starts one
server at a time on 127.0.0.1, and ends each before it returns.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageDraw

from aircache_sglang.testing import LoadWatch, Server, ServerError
from benchmarks.documents import CHECKPOINT
from benchmarks.documents.pages import CELL
from examples.page import Invoice, invoice

# Code on the invoice, and how it is asked for.
QUESTIONS = {
    "SUM": "what is the value of SUM?",
    "REF": "please look up REF",
    "ACC": "find ACC and copy the value beside it",
    "BUY": "which value belongs to BUY?",
}
NUMBER = 4  # of the invoice
PICTURED = ("SUM", "ACC")  # the questions whose selection is drawn
MARKER = "#ffcc33"
RETENTIONS = (1.0, 0.5, 0.1)
WATCHED_TOKENS = 32
TOKENS = 16
FLAGS = (
    *("--device", "cpu", "--dtype", "float32"),
    *("--max-total-tokens", "16384", "--context-length", "8192"),
    # Timings in meta_info; a fresh count of the pool at every step; no polling while idle.
    *("--enable-metrics", "--load-snapshot-publish-interval", "1", "--sleep-on-idle"),
)


@dataclasses.dataclass(slots=True)
class Row:
    """One line of the table: the questions under one setting."""

    name: str
    answers: list[str] = dataclasses.field(default_factory=list)
    right: int = 0
    reports: list[dict[str, Any] | None] = dataclasses.field(default_factory=list)
    token_seconds: list[float] = dataclasses.field(default_factory=list)
    kv_in_use: int = 0


class Progress:
    """Prints what happens, with the seconds since the start."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"[{time.monotonic() - self._started:5.1f} s] {text}", flush=True)


def ask(server: Server, name: str, page: Invoice, overrides: dict[str, Any] | None) -> Row:
    """Ask every question on `page`, one after the other, on an empty cache."""
    row, picture = Row(name), page.image()
    server.flush_cache()
    fields: dict[str, Any] = {"return_meta_info": True}
    if overrides:
        fields["custom_params"] = {"aircache": overrides}
    for code, question in QUESTIONS.items():
        answer = server.chat(question, images=[picture], max_tokens=TOKENS, **fields)
        choice = answer["choices"][0]
        meta = choice["meta_info"]
        row.answers.append(choice["message"]["content"])
        row.right += row.answers[-1] == page.facts[code]
        row.reports.append(meta.get("aircache"))
        row.token_seconds.append(1 / meta["decode_throughput"])
    # Once more, watched: the reading would disturb the timings.
    with LoadWatch(server, interval=0.02) as watch:
        server.chat(
            QUESTIONS["SUM"],
            images=[picture],
            max_tokens=WATCHED_TOKENS,
            ignore_eos=True,
            **fields,
        )
    in_use = [load["num_used_tokens"] for load in watch.loads() if load["num_running_reqs"]]
    if not in_use:
        raise ServerError(f"no reading of the KV tokens in use, {name}")
    # The last one is of the decode: until the prefill ends it holds all visual slots.
    row.kv_in_use = in_use[-1]
    return row


def ask_for_selection(server: Server, code: str, page: Invoice) -> tuple[str, dict[str, Any]]:
    """The answer at the least retention, and its report with the tokens that were kept."""
    overrides = {"retention": RETENTIONS[-1], "return_selection": True}
    answer = server.chat(
        QUESTIONS[code],
        images=[page.image()],
        max_tokens=TOKENS,
        return_meta_info=True,
        custom_params={"aircache": overrides},
    )["choices"][0]
    return answer["message"]["content"], answer["meta_info"]["aircache"]


def table(rows: Sequence[Row], n_visual: int) -> str:
    """The rows as text; the first is stock SGLang's."""
    head = (
        *("", "visual tokens", "columns", "slots freed", "KV tokens in use", "ms per token"),
        "right answers",
    )
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        report = row.reports[0]
        lines.append(
            (
                row.name,
                str(n_visual),
                str(report["columns"]) if report else "-",
                str(report["slots_freed"]) if report else "0",
                str(row.kv_in_use),
                f"{1000 * statistics.median(row.token_seconds):.1f}",
                f"{row.right} of {len(row.answers)}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def selection_picture(
    page: Image.Image, answers: Sequence[tuple[str, dict[str, Any]]]
) -> Image.Image:
    """The page, and beside it what is left of it after each question.

    answers: captions, each with the report of its request, selection included. The more layers and
    KV heads keep a token, the more of it stays; what none keeps is blank.
    """
    width, height = page.size
    per_row = width // CELL
    header, gap = 64, 24
    n_visual = per_row * height // CELL
    panels = [(f"the page: {n_visual} visual tokens", "stock SGLang keeps all", page)]
    for caption, report in answers:
        heads = [head for layer in report["selection"] for head in layer]
        counts = Counter(ordinal for head in heads for ordinal in head)
        most = max(counts.values())
        panel = Image.new("RGB", page.size, "white")
        for ordinal, count in counts.items():
            y, x = divmod(ordinal, per_row)
            box = (x * CELL, y * CELL, (x + 1) * CELL, (y + 1) * CELL)
            # The ink stays the page's, the paper becomes the marker's.
            marked = ImageChops.multiply(page.crop(box), Image.new("RGB", (CELL, CELL), MARKER))
            panel.paste(Image.blend(panel.crop(box), marked, count / most), box)
        below = f"{report['columns']} of {n_visual} slots; darker: kept by more heads"
        panels.append((caption, below, panel))
    sheet = Image.new("RGB", (len(panels) * (width + gap) + gap, height + header + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (caption, below, panel) in enumerate(panels):
        left = gap + place * (width + gap)
        draw.text((left, 8), caption, fill="black", font_size=22)
        draw.text((left, 36), below, fill="#666666", font_size=18)
        sheet.paste(panel, (left, header))
        draw.rectangle((left - 1, header - 1, left + width, header + height), outline="#999999")
    return sheet.quantize(64)


def run(picture: Path, say: Progress) -> bool:
    """Everything between the parsed arguments and the verdict on retention 1."""
    page = invoice(NUMBER)
    rows, columns = page.sheet.shape
    picture.parent.mkdir(parents=True, exist_ok=True)
    page.image().save(picture.with_name("demo-page.png"))
    found = []
    say("starting stock SGLang: --kv-policy none")
    with server_of("none", picture.parent) as server:
        server.chat(QUESTIONS["SUM"], images=[page.image()], max_tokens=4)  # first use costs more
        say(f"asking {len(QUESTIONS)} questions about an invoice of {rows * columns} visual tokens")
        found.append(ask(server, "none", page, None))
        say("stopping it")

    say("starting SGLang with AirCache: --kv-policy aircache")
    with server_of("aircache", picture.parent) as server:
        server.chat(QUESTIONS["SUM"], images=[page.image()], max_tokens=4)
        for retention in RETENTIONS:
            say(f"asking the same questions at retention {retention:g}")
            name = f"aircache, retention {retention:g}"
            found.append(ask(server, name, page, {"retention": retention}))
        pictured = [(code, ask_for_selection(server, code, page)) for code in PICTURED]
        say("stopping it")

    captions = [(f"{code}?  answer: {text}", report) for code, (text, report) in pictured]
    selection_picture(page.image(), captions).save(picture)
    print(f"\n{table(found, rows * columns)}\n")
    for question, *answers in zip(QUESTIONS.values(), *(row.answers for row in found), strict=True):
        print(f"  {question:40}{'  '.join(answers)}")
    print(
        f"\nWhat two of the questions leave of the page at retention {RETENTIONS[-1]:g}: {picture}"
    )
    return found[1].answers == found[0].answers


def server_of(policy: str, folder: Path) -> Server:
    """A server of the model, not yet started; its log goes to `folder`."""
    log = folder / f"demo-{policy}.log"
    return Server(CHECKPOINT, [*FLAGS, "--kv-policy", policy], log=log)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description="Stock SGLang and AirCache, side by side."
    )
    parser.add_argument(
        "--picture",
        type=Path,
        default=Path("build/demo-selection.png"),
        help="where the picture of the kept tokens goes (default build/demo-selection.png)",
    )
    arguments = parser.parse_args(argv)

    if threading.current_thread() is threading.main_thread():
        # Leave through the servers' context managers, which end them.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    say = Progress()
    try:
        same = run(arguments.picture, say)
    except (ServerError, OSError) as error:
        # A server's error is followed by the end of its log.
        reason = str(error).partition("\n")[0]
        logs = arguments.picture.parent / "demo-*.log"
        print(f"The demo failed: {reason}; the servers' logs are {logs}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("The demo was interrupted; its servers are stopped.", file=sys.stderr)
        return 130
    if not same:
        print("The demo failed: retention 1 did not answer as stock SGLang does.", file=sys.stderr)
        return 1
    say("done: retention 1 gave the same answers as stock SGLang")
    return 0


if __name__ == "__main__":
    sys.exit(main())
