# SPDX-License-Identifier: Apache-2.0
"""Trains the model that reads the pages: `make train`.

First the vision tower learns to say which character stands in a cell, as the decoder's embedding
of that character. Then the decoder learns the questions, on pages that grow as it gets them right.
Where to look is taught as soon as it reads small pages: from nothing on, it learned neither.
`--plain` teaches answers alone: not where to look, and with the whole page in sight.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.documents.model import (
    EMBEDDING_STD,
    GUIDED_FROM,
    IGNORED,
    SHAPE,
    Hold,
    answer_logits,
    character_ids,
    initialise,
    load,
    make_batch,
    save,
    see,
    write_untrained,
)
from benchmarks.documents.pages import BLANK, CHARACTERS, Sheet, render
from benchmarks.documents.questions import KINDS, LARGE, Layout, document

READING_STEPS = 2500
SHARPNESS = 8.0  # of the characters' logits: about 20 where an embedding is exact
READING_RATE = 2e-3
# Attention among patches is dense: small pages cost least, large ones show what is to come.
READING_PAGES = ((4, 4), (4, 4), (4, 4), (4, 4), (16, 16))
RATE = 1e-3
WARMUP = 100
DECAY = 0.5
LARGE_PAGES = 0.2  # share of batches with pages of 1,024 tokens, once a kind's pages are full
ADVANCE = 0.6  # exact match, of the last batches, at which a kind's pages grow
WATCHED = 12  # batches
TOKENS = 2800  # of a batch, about
QUESTIONS = 16
SAVE_SECONDS = 120
BAR = 20
GROUNDING = 0.2  # weight of the grounding loss
FIRST = 4.0  # weight of an answer's first token in the loss

LADDER: dict[str, tuple[Layout, ...]] = {
    **{kind: tuple(Layout(kind, rows, 16) for rows in (4, 8, 16)) for kind in ("value", "line")},
    "cell": (
        Layout("cell", 4, 16),  # one column
        Layout("cell", 4, 17),  # two
        *(Layout("cell", rows, 24) for rows in (4, 8, 12)),
    ),
    "page": (
        Layout("page", 4, 16, 1),
        Layout("page", 4, 16, 2),
        Layout("page", 8, 16, 2),
        Layout("page", 16, 16, 2),
        Layout("page", 16, 16, 3),
    ),
}


@dataclasses.dataclass(slots=True)
class Progress:
    """Where a training stands; saved with the weights."""

    step: int = 0
    seconds: float = 0.0
    levels: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    recent: dict[str, list[float]] = dataclasses.field(
        default_factory=lambda: {kind: [] for kind in KINDS}
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Lesson:
    """How the decoder is taught.

    rates: the learning rate of each step; dtype: of the decoder's products; guide_from: the lowest
    layer of `Guide`, which begins once every kind's pages have grown; None: no guide.
    """

    rates: Sequence[float]
    seed: int
    kinds: Sequence[str]
    dtype: torch.dtype
    guide_from: int | None


class Log:
    """A line of JSON in the file and a progress bar on the screen, for each report."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def __call__(self, **row: Any) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        done = round(BAR * row["step"] / row["of"])
        scores = " ".join(f"{k} {v}" for k, v in row.items() if k not in ("step", "of"))
        print(f"[{'#' * done}{'-' * (BAR - done)}] {row['step']}/{row['of']} {scores}", flush=True)


def learn_to_read(model: Any, tokenizer: Any, steps: int, seed: int, say: Log) -> None:
    """Teach the vision tower the embeddings of characters."""
    generator = np.random.default_rng((seed, 1))
    ids = character_ids(tokenizer)
    lookup = model.model.language_model.embed_tokens.weight.detach()
    wanted = lookup[ids]
    emphasis = torch.randn(lookup.shape[1], generator=torch.Generator().manual_seed(seed)).mul_(
        0.7 * EMBEDDING_STD
    )
    tower = model.model.visual
    optimizer = torch.optim.AdamW(tower.parameters(), READING_RATE, weight_decay=0.01)
    for step in range(steps):
        rows, columns = READING_PAGES[step % len(READING_PAGES)]
        count = max(1, 1024 // (rows * columns))
        sheets = []
        for _ in range(count):
            codes = generator.integers(1, len(CHARACTERS), size=(rows, columns))
            codes[generator.random(codes.shape) < 0.2] = CHARACTERS.index(BLANK)
            text = tuple("".join(CHARACTERS[c] for c in row) for row in codes)
            sheets.append((Sheet(text, generator.random(codes.shape) < 0.3), codes))
        pages = np.stack([render(sheet, generator) for sheet, _ in sheets])
        printed = torch.from_numpy(np.stack([codes for _, codes in sheets])).flatten()
        bold = torch.from_numpy(np.stack([sheet.bold for sheet, _ in sheets])).flatten()
        bold = bold & (printed != CHARACTERS.index(BLANK))
        target = wanted[printed] + bold[:, None] * emphasis
        for group in optimizer.param_groups:
            group["lr"] = READING_RATE * min(1, (step + 1) / 50) * (1 - step / steps)
        seen = see(model, pages).flatten(0, 1)
        loss = functional.mse_loss(seen, target) / EMBEDDING_STD**2
        loss = loss + functional.cross_entropy(seen @ wanted.T * SHARPNESS, printed)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 19 or step == steps - 1:
            distance = torch.cdist(seen.detach() - bold[:, None] * emphasis, wanted)
            right = torch.eq(distance.argmin(-1), printed).float().mean().item()
            say(phase="reading", step=step + 1, of=steps, loss=loss.item(), characters=right)


def learning_rates(steps: int, highest: float, decay: float) -> list[float]:
    """Of each step: warm-up, constant, linear to zero over the last share `decay` of the steps."""
    return [
        highest * min(1.0, (step + 1) / WARMUP, (steps - step) / (decay * steps))
        for step in range(steps)
    ]


def choose(progress: Progress, kinds: Sequence[str], generator: Any) -> Layout:
    """A layout for the next batch: kinds that are behind come more often, as do current levels."""
    behind = np.array([1.2 - mean(progress.recent[kind], 0.5) for kind in kinds])
    kind = kinds[generator.choice(len(kinds), p=behind / behind.sum())]
    level = progress.levels[kind]
    if kind in LARGE and level == len(LADDER[kind]) - 1 and generator.random() < LARGE_PAGES:
        return LARGE[kind]
    if level and generator.random() < 0.2:
        level = int(generator.integers(level))
    return LADDER[kind][level]


def mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def learn_to_answer(
    model: Any,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    lesson: Lesson,
    keep: Callable[[], None],
    say: Log,
    stopped: Callable[[], bool],
) -> None:
    """Train the decoder from `progress.step` on, one step for each of the lesson's rates."""
    decoder, rates, kinds = model.model.language_model, lesson.rates, lesson.kinds
    hold = Hold(model)
    steps = len(rates)
    began, saved = time.monotonic() - progress.seconds, time.monotonic()
    window: dict[str, collections.deque[tuple[float, float]]] = {
        kind: collections.deque(maxlen=50) for kind in kinds
    }
    while progress.step < steps and not stopped():
        # Seeded by the step, so that a training that was cut off goes on as if it had not been.
        generator = np.random.default_rng((lesson.seed, 2, progress.step))
        layout = choose(progress, kinds, generator)
        count = max(1, round(TOKENS / (layout.visual_tokens + QUESTIONS * 26)))
        documents = [document(layout, generator, held_out=False) for _ in range(count)]
        questions = min(QUESTIONS, max(6, len(documents[0].asks)))
        batch = make_batch(documents, questions, layout.kind, tokenizer, generator)
        for group in optimizer.param_groups:
            group["lr"] = rates[progress.step]
        drop = int(generator.integers(2**31))
        grown = all(progress.levels[kind] > 0 for kind in kinds)
        if grown:
            hold.release()
        guide_from = lesson.guide_from if grown else None
        logits, targets, guide = answer_logits(
            model, batch, tokenizer, dtype=lesson.dtype, drop=drop, guide_from=guide_from
        )
        lengths = (batch.targets != IGNORED).sum(-1).flatten()
        # The first token is the hard one: it is found, the others are read on from it.
        weight = torch.ones(len(targets)).index_fill_(0, lengths.cumsum(0) - lengths, FIRST)
        losses = functional.cross_entropy(logits, targets, reduction="none")
        loss = (losses * weight).sum() / weight.sum()
        grounded = None if guide is None else guide.loss()
        optimizer.zero_grad()
        (loss if grounded is None else loss + GROUNDING * grounded).backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        right = (logits.argmax(-1) == targets).split(lengths.tolist())
        exact = sum(bool(answer.all()) for answer in right) / len(right)
        window[layout.kind].append((loss.item(), exact))
        if layout == LADDER[layout.kind][progress.levels[layout.kind]]:
            recent = progress.recent[layout.kind]
            recent.append(exact)
            del recent[:-WATCHED]
            top = progress.levels[layout.kind] == len(LADDER[layout.kind]) - 1
            if len(recent) == WATCHED and mean(recent, 0) >= ADVANCE and not top:
                progress.levels[layout.kind] += 1
                recent.clear()
        progress.step += 1
        progress.seconds = time.monotonic() - began
        if progress.step % 20 == 0 or progress.step == steps:
            say(
                phase="answering",
                step=progress.step,
                of=steps,
                seconds=round(progress.seconds),
                rate=rates[progress.step - 1],
                loss={
                    kind: round(mean([x for x, _ in w], math.nan), 3) for kind, w in window.items()
                },
                exact={kind: round(mean(progress.recent[kind], 0.0), 3) for kind in kinds},
                **({} if grounded is None else {"grounding": round(grounded.item(), 2)}),
                level={kind: progress.levels[kind] for kind in kinds},
            )
        if time.monotonic() - saved > SAVE_SECONDS:
            keep()
            saved = time.monotonic()
    keep()


def train(arguments: argparse.Namespace, log: Log) -> Progress:
    """Start, or go on, until all steps are done or a signal says to stop."""
    state_file, template = arguments.work / "state.pt", arguments.work / "template"
    if not template.exists():
        write_untrained(template)
    model, tokenizer = load(template)
    progress = Progress()
    state = torch.load(state_file, weights_only=False) if state_file.exists() else None
    if state is not None:
        model.load_state_dict(state["model"])
        progress = Progress(**state["progress"])
    elif arguments.warm_start is not None:
        model.load_state_dict(load(arguments.warm_start)[0].state_dict())
    else:
        initialise(model, arguments.seed)
        learn_to_read(model, tokenizer, READING_STEPS, arguments.seed, log)
    model.model.visual.requires_grad_(False)
    decoder = model.model.language_model
    groups: list[dict[str, Any]] = [
        {"params": [p for p in decoder.parameters() if p.ndim > 1]},
        {"params": [p for p in decoder.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, RATE, betas=(0.9, 0.98), weight_decay=0.01)
    if state is not None and state["optimizer"]:
        optimizer.load_state_dict(state["optimizer"])

    def keep() -> None:
        partial = state_file.with_suffix(".partial")
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict() if progress.step else None,
                "progress": dataclasses.asdict(progress),
            },
            partial,
        )
        partial.rename(state_file)

    if state is None:
        keep()
    lesson = Lesson(
        learning_rates(arguments.steps, arguments.rate, arguments.decay),
        arguments.seed,
        arguments.kinds,
        getattr(torch, arguments.dtype),
        arguments.guide_from,
    )
    with stopped_by_signals() as stopped:
        learn_to_answer(model, tokenizer, optimizer, progress, lesson, keep, log, stopped)
    if progress.step == arguments.steps:
        save(model, template, arguments.output or arguments.work / "checkpoint")
    return progress


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[Callable[[], bool]]:
    """Whether to stop, asked between two steps: a step is never cut in half."""
    asked: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: asked.append(number)) for number in numbers]
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.documents.train", description=__doc__
    )
    parser.add_argument("--work", type=Path, default=Path("build/train"), help="state of the run")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=RATE, help="highest learning rate")
    parser.add_argument(
        "--decay", type=float, default=DECAY, help="share of the steps over which it falls"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="(all)")
    guide = parser.add_mutually_exclusive_group()
    guide.add_argument(
        "--plain",
        dest="guide_from",
        action="store_const",
        const=None,
        default=GUIDED_FROM,
        help="answers alone: no guide, no dropped visual KV",
    )
    guide.add_argument(
        "--guide-from",
        type=int,
        default=GUIDED_FROM,
        choices=range(SHAPE["layers"]),
        metavar="LAYER",
        help="the lowest layer that is taught where to look (default %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of the decoder's products; float32 where the CPU has no bfloat16 of its own",
    )
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--output", type=Path, help="folder of the weights (default: checkpoint in --work)"
    )
    parser.add_argument(
        "--warm-start", type=Path, help="start from the weights of this checkpoint folder"
    )
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    if not arguments.rate > 0:
        parser.error(f"--rate must be positive, got {arguments.rate}")
    if not 0 < arguments.decay <= 1:
        parser.error(f"--decay must be above 0 and at most 1, got {arguments.decay}")
    start = arguments.warm_start
    if start is not None and not (start / "model.safetensors").is_file():
        parser.error(f"{start} holds no model")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    with (work / "log.jsonl").open("a") as log:
        progress = train(arguments, Log(log))
    if progress.step < arguments.steps:
        print(f"Interrupted at step {progress.step}; the same command goes on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
