# SPDX-License-Identifier: Apache-2.0
"""A conversation of many turns, a frame each: bounded, and beside it stock SGLang.

    python -m benchmarks.conversation                  # 300 turns, 60 of stock's; ten minutes

`examples.watch` on the document model, a server after the other, each with a pool that holds the
whole conversation: stock SGLang needs one, and SGLang refuses longer prompts. *held* are the slots
that the conversation has at the end of a turn: columns and text, or all of it. Stock's turns are
fewer, since each takes longer than the one before.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from aircache_sglang.testing import Server
from benchmarks.documents import CHECKPOINT
from benchmarks.records import RESULTS, Results, Row, model_label, read
from benchmarks.report import table, write
from examples.watch import Client, Conversation, Turn, turns

COLUMNS = 160
FRAME = 256  # visual tokens
MODES: Mapping[str, Sequence[str]] = {
    "bounded": (
        *("--kv-policy", "aircache", "--aircache-reuse", "compressed"),
        *("--aircache-session-columns", str(COLUMNS), "--aircache-rungs", "0.3,0.1"),
    ),
    "stock": ("--kv-policy", "none"),
}
# A turn's tokens, and those of its answer.
LENGTH, ANSWER = 310, 12
SHOWN = (1, 10, 30, 60, 100, 200, 300)
WINDOW = 10  # turns whose median is a time


def flags(count: int) -> list[str]:
    """Of both servers, for so many turns."""
    room = str(LENGTH * count + 2048)
    return [
        *("--device", "cpu", "--dtype", "float32", "--max-total-tokens", room),
        *("--context-length", room, "--max-running-requests", "4", "--sleep-on-idle"),
    ]


def run(results: Results, mode: str, count: int, common: Sequence[str]) -> None:
    """All turns of one mode, a row each; common: flags of both servers."""
    env = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    sampling = {"max_new_tokens": ANSWER, "temperature": 0.0}
    with Server(CHECKPOINT, [*common, *MODES[mode]], env=env, timeout=1800) as server:
        from transformers import AutoTokenizer

        client = Client(server.url)
        tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
        conversation = Conversation(client, tokenizer, resend=False)
        with contextlib.closing(conversation):
            for turn in turns(client, conversation, count, sampling):
                results.add(key_of(mode, turn), row_of(turn, mode))
                print(f"{mode} {turn.number}: {turn.seconds:.2f} s, {turn.said}", flush=True)


def key_of(mode: str, turn: Turn) -> Row:
    return {"benchmark": "conversation", "mode": mode, "turn": turn.number}


def row_of(turn: Turn, mode: str) -> Row:
    visual = turn.number * FRAME
    held = turn.tokens if turn.columns is None else turn.tokens - visual + turn.columns
    return {
        **{f.name: getattr(turn, f.name) for f in dataclasses.fields(turn) if f.name != "number"},
        "held": held,
        "mode_flags": " ".join(MODES[mode]),
        "load": os.getloadavg()[0],
    }


def seconds_at(rows: Sequence[Row], turn: int) -> float:
    """The median to the first token of the turns that end at this one."""
    near = [row["seconds"] for row in rows if turn - WINDOW < row["key"]["turn"] <= turn]
    return statistics.median(near)


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """What the conversation holds and takes, turn by turn."""
    found = {mode: [row for row in rows if row["key"]["mode"] == mode] for mode in MODES}
    found = {mode: some for mode, some in found.items() if some}
    yield "## A conversation of bounded memory\n"
    yield (
        f"A frame of {FRAME} visual tokens and a question about it a turn, in one session of "
        f"SGLang's. *Held* are slots at the end of the turn; *first token* is the median of the "
        f"last {WINDOW} turns, in seconds; *right* are answers since the row before.\n"
    )
    lines = []
    for mode, some in found.items():
        last = 0
        for row in some:
            turn = row["key"]["turn"]
            if turn not in SHOWN and row is not some[-1]:
                continue
            right = sum(r["right"] for r in some if last < r["key"]["turn"] <= turn)
            columns = "-" if row["columns"] is None else str(row["columns"])
            line = [f"{turn}, {mode}", str(row["tokens"]), str(row["anew"]), columns]
            line += [str(row["held"]), f"{seconds_at(some, turn):.2f}"]
            lines.append([*line, f"{right} of {turn - last}"])
            last = turn
    head = ["turn, mode", "conversation", "computed anew", "columns", "held", "first token"]
    yield table([*head, "right"], lines)
    for mode, some in found.items():
        yield f"- {mode}: `{some[0]['mode_flags']}`"
    yield ""
    for mode, some in found.items():
        most = max(row["columns"] or 0 for row in some)
        bound = f"; at most {most} columns" if most else ""
        if len(some) >= 30:
            last = some[-1]["key"]["turn"]
            ratio = seconds_at(some, last) / seconds_at(some, 30)
            yield (
                f"{mode}: the first token of turn {last} takes {ratio:.2f} of turn 30's"
                f"{bound}; {sum(row['right'] for row in some)} of {len(some)} answers are right.\n"
            )


def measure(path: Path, count: int, of_stock: int) -> None:
    """Both conversations. One that was cut off is of no use to the next run: the file is new."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    path.unlink(missing_ok=True)
    about = {
        "preset": f"conversation: {count} turns, {of_stock} of stock's",
        "model": model_label(CHECKPOINT),
        "flags": " ".join(flags(count)),
        "url": None,
    }
    results = Results(path, about)
    run(results, "bounded", count, flags(count))
    run(results, "stock", of_stock, flags(count))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.conversation", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("action", nargs="?", choices=("run", "report"), default="run")
    parser.add_argument("--turns", type=int, default=300)
    parser.add_argument("--stock-turns", type=int, default=60)
    parser.add_argument("--file", type=Path, default=RESULTS / "conversation.jsonl")
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.stock_turns <= arguments.turns:
        parser.error(
            f"--stock-turns must be at least 1 and at most --turns, got {arguments.stock_turns}"
        )
    if arguments.action == "run":
        measure(arguments.file, arguments.turns, arguments.stock_turns)
    rows = read(arguments.file)
    write(arguments.file, rows, tables(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
