# SPDX-License-Identifier: Apache-2.0
"""Many mixed requests at once, some of them broken off: the same jobs for the same seed."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import requests
from PIL import Image

from aircache_sglang.testing.checkpoints.vocabulary import WORDS
from aircache_sglang.testing.server import Server, png_data_url

TOKEN_SIDE = 28
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
# Visual tokens per side of the pictures: below, at and above the minimum of 64 tokens.
SHAPES = ((4, 4), (8, 8), (8, 10), (10, 12), (6, 9), (12, 14))


@functools.cache
def picture(seed: int) -> Image.Image:
    """Coloured squares, `SHAPES[seed % 6]` visual tokens."""
    rows, columns = SHAPES[seed % len(SHAPES)]
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    size = (columns * TOKEN_SIDE, rows * TOKEN_SIDE)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


@functools.cache
def picture_url(seed: int) -> str:
    return png_data_url(picture(seed))


def visual_tokens(seed: int) -> int:
    rows, columns = SHAPES[seed % len(SHAPES)]
    return rows * columns


def words(rng: random.Random, n: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(n))


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is asked; two jobs of one prompt differ in length and fate alone."""

    text: str
    pictures: tuple[int, ...]
    retention: float | None

    @property
    def n_visual(self) -> int:
        return sum(visual_tokens(seed) for seed in self.pictures)

    @property
    def compressible(self) -> bool:
        return self.n_visual >= 64 and (self.retention or 0.1) < 1

    def body(self, max_new_tokens: int) -> dict[str, Any]:
        sampling: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
        }
        if self.retention is not None:
            sampling["custom_params"] = {"aircache": {"retention": self.retention}}
        body: dict[str, Any] = {"text": self.text, "sampling_params": sampling}
        if self.pictures:
            body["image_data"] = [picture_url(seed) for seed in self.pictures]
        return body


def make_prompts(seed: int, n: int, *, n_pictures: int = 9) -> list[Prompt]:
    """Text alone, one picture, several, one picture twice; texts before, between and after."""
    rng = random.Random(seed)
    heads = [words(rng, length) for length in (1, 7, 40)]
    prompts = []
    for index in range(n):
        count = (0, 1, 1, 2, 3, 1)[index % 6]
        pictures = [rng.randrange(n_pictures) for _ in range(count)]
        if index % 12 == 9:
            pictures = [pictures[0]] * 2
        parts = [rng.choice(heads)]
        for place, _ in enumerate(pictures):
            between = "" if place == 0 else words(rng, rng.choice((0, 1, 9)))
            parts.append(between + PICTURE)
        parts.append(" " + words(rng, rng.choice((2, 5, 15, 60))))
        retention = rng.choice((None, None, 0.02, 0.3, 0.5, 1.0)) if pictures else None
        prompts.append(Prompt("".join(parts), tuple(pictures), retention))
    return prompts


@dataclasses.dataclass(frozen=True)
class Job:
    """fate: `finish`, `abort` (POST /abort_request) or `disconnect`, the latter after `delay` s."""

    rid: str
    prompt: Prompt
    max_new_tokens: int
    stream: bool
    fate: str
    delay: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    job: Job
    answer: dict[str, Any] | None
    error: str | None = None

    @property
    def finished(self) -> bool:
        """Ended by its length, whatever its fate should have been."""
        return (
            self.answer is not None
            and (self.answer["meta_info"]["finish_reason"] or {}).get("type") == "length"
        )


def make_jobs(seed: int, n: int, prompts: Sequence[Prompt], *, longest: int) -> list[Job]:
    rng = random.Random(seed)
    jobs = []
    for index in range(n):
        fate = rng.choices(("finish", "abort", "disconnect"), (0.72, 0.16, 0.12))[0]
        jobs.append(
            Job(
                # SGLang aborts every request whose id begins with the given one.
                rid=f"storm-{seed}-{index:05}",
                prompt=rng.choice(prompts),
                max_new_tokens=rng.choice((1, 2, 5, longest // 2, longest)),
                stream=fate == "disconnect" or rng.random() < 0.4,
                fate=fate,
                # From before the prefill to after the end.
                delay=rng.expovariate(1 / 0.4),
            )
        )
    return jobs


class Storm:
    """Runs jobs against one server, `concurrency` at a time.

    The server empties its tree only in an idle moment: jobs come in waves, and a flush ends each.
    """

    def __init__(self, server: Server, *, concurrency: int) -> None:
        self.server = server
        self.concurrency = concurrency
        self.flushed = 0

    def run(self, jobs: Sequence[Job], *, waves: int) -> list[Outcome]:
        size = -(-len(jobs) // waves)
        outcomes: list[Outcome] = []
        for start in range(0, len(jobs), size):
            with ThreadPoolExecutor(self.concurrency) as pool:
                running = [pool.submit(self._run_one, job) for job in jobs[start : start + size]]
                # Refused while requests run, and must do no harm.
                self.server.request("POST", "/flush_cache")
                outcomes.extend(future.result() for future in running)
            flush(self.server)
            self.flushed += 1
        return outcomes

    def _run_one(self, job: Job) -> Outcome:
        timer = None
        if job.fate == "abort":
            timer = threading.Timer(job.delay, self._abort, (job.rid,))
            timer.start()
        try:
            return self._ask(job)
        except requests.RequestException as error:
            return Outcome(job, None, f"{job.rid} ({job.fate}): {error!r}; {self._state()}")
        finally:
            if timer is not None:
                timer.join()

    def _state(self) -> str:
        """What the server does while a request of ours has no answer."""
        try:
            return f"{loads(self.server)}\n{self.server.log_tail()}"
        except (requests.RequestException, ValueError, LookupError) as error:
            return f"no load: {error!r}"

    def _abort(self, rid: str) -> None:
        requests.post(self.server.url + "/abort_request", json={"rid": rid}, timeout=60)

    def _ask(self, job: Job) -> Outcome:
        body = job.prompt.body(job.max_new_tokens) | {"rid": job.rid, "stream": job.stream}
        url = self.server.url + "/generate"
        answer: dict[str, Any] | None = None
        with requests.post(url, json=body, timeout=120, stream=job.stream) as response:
            if response.status_code != 200:
                aborted = job.fate == "abort" and response.status_code in (400, 499)
                return Outcome(job, None, None if aborted else response.text)
            if not job.stream:
                answer = response.json()
            else:
                leave_at = time.monotonic() + job.delay if job.fate == "disconnect" else None
                for line in response.iter_lines():
                    if line.startswith(b"data: {"):
                        answer = json.loads(line.removeprefix(b"data: "))
                        if "error" in answer:
                            aborted = job.fate == "abort"
                            return Outcome(job, None, None if aborted else line.decode())
                    if leave_at is not None and time.monotonic() > leave_at:
                        break
        return Outcome(job, answer)


def assert_answered(outcomes: Sequence[Outcome]) -> None:
    """No request failed that was not broken off."""
    errors = [outcome.error for outcome in outcomes if outcome.error]
    assert not errors, "\n".join(errors)


def assert_equal_reports(*answers: Any) -> None:
    """Of two answers. Sums of the same numbers are rounded to six digits, and a batch may add them
    in another order."""
    reports = [dict(answer["meta_info"].get("aircache") or {}) for answer in answers]
    masses = [report.pop("visual_mass", 0.0) for report in reports]
    assert reports[0] == reports[1] and abs(masses[0] - masses[1]) < 2e-6, (reports, masses)


def flush(server: Server) -> None:
    """Empty the radix tree, once what was broken off has ended."""
    response = server.request("POST", "/flush_cache?timeout=60")
    assert response.status_code == 200, f"{response.text}\n{server.log_tail()}"


def loads(server: Server) -> dict[str, Any]:
    """The scheduler's own snapshot of its load."""
    snapshot: dict[str, Any] = server.get("/v1/loads?include=all")["loads"][0]
    return snapshot


def wait_idle(server: Server, timeout: float = 60.0) -> None:
    """Wait until no request runs or waits."""
    deadline = time.monotonic() + timeout
    while True:
        load = loads(server)
        if load["num_running_reqs"] == load["num_waiting_reqs"] == 0:
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"requests are left: {load}\n{server.log_tail()}")
        time.sleep(0.05)


def fates(outcomes: Sequence[Outcome]) -> Counter[str]:
    return Counter(outcome.job.fate for outcome in outcomes)
