# SPDX-License-Identifier: Apache-2.0
"""Stock SGLang, `prefill` and `pressure` under one rising load: open loop, Poisson arrivals.

The document model answers questions about pages of their own, so that no two requests share
visual KV, from a pool that is small for them. All modes are asked the same questions at the same
moments, rate by rate, from servers side by side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests

from aircache_sglang.testing import Client, Server, ServerError, png_data_url
from benchmarks.documents import CHECKPOINT
from benchmarks.documents.questions import Question, evaluation_set
from benchmarks.quality.metrics import exact_match
from benchmarks.records import RESULTS, Results, Row, model_label
from benchmarks.throughput.measure import PICTURE
from benchmarks.throughput.plan import COMMON

KIND = "page"  # three pages, 768 visual tokens, one question about one of them
END = "<|im_end|>"
SEED = 17  # of the arrivals
RATES = (0.3, 0.6, 1.0, 1.5, 2.5)  # requests a second
FILE = RESULTS / "load.jsonl"

_COMPRESSING = ("--kv-policy", "aircache", "--aircache-gate", "off")
_PACKED = (*_COMPRESSING, "--aircache-retention", "0.1")
MODES: Mapping[str, Sequence[str]] = {
    "stock": ("--kv-policy", "none"),
    "prefill": _PACKED,
    "pressure": (
        *(*_COMPRESSING, "--aircache-when", "pressure"),
        *("--aircache-rungs", "0.5,0.25,0.1"),
    ),
    # What comparing every answer with the full KV costs those that come meanwhile.
    "shadow": (*_PACKED, "--aircache-shadow", "1"),
}
COMPARED = ("stock", "prefill", "pressure")  # unless others are asked for


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """What is asked for at each rate, and what counts as in time.

    requests: of a trial, each about pages of its own. tokens: of each answer, the end ignored, so
    that requests stay in the pool for as long as those of a long answer do. pool: slots.
    Limits of a request in seconds: ttft from its arrival to its first token, tpot per token after.
    """

    requests: int = 40
    tokens: int = 192
    pool: int = 3584
    ttft: float = 5.0
    tpot: float = 0.1

    def arrivals(self, rate: float) -> list[float]:
        """Seconds from the start of a trial, the first 0; at every rate the same but for scale."""
        gaps = np.random.default_rng(SEED).exponential(size=self.requests)
        gaps[0] = 0.0
        return [float(at) for at in gaps.cumsum() / rate]

    def in_time(self, answer: Answer) -> bool:
        """Whether a request was answered whole, within both limits."""
        return not answer.failed and answer.ttft <= self.ttft and answer.tpot <= self.tpot

    def flags(self) -> list[str]:
        """Of all servers. Their pool is what is short, not the requests that they may run."""
        return [
            *("--device", "cpu", "--dtype", "float32", "--max-total-tokens", str(self.pool)),
            *("--context-length", "2048", "--max-running-requests", "64", "--sleep-on-idle"),
            *COMMON,
        ]

    def about(self) -> Row:
        """What rows carry of it: those of another load cannot stand in the same file."""
        return {
            "preset": f"load: {self}, kind {KIND}",
            "model": model_label(CHECKPOINT),
            "flags": " ".join(self.flags()),
            "url": None,
        }


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """One request, from its arrival, in seconds; `failed` is why it was not answered whole.

    ttft: to the first token. tpot: from the first token to the last, a token. end: of the answer,
    from the start of the trial. meta: SGLang's meta_info.
    """

    text: str = ""
    ttft: float = math.inf
    tpot: float = math.inf
    end: float = 0.0
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    failed: str | None = None

    @property
    def said(self) -> str:
        """What stands before the end of the answer; what follows is there to hold slots."""
        return self.text.partition(END)[0]

    @property
    def report(self) -> Mapping[str, Any]:
        return self.meta.get("aircache") or {}

    @property
    def kept(self) -> float:
        """The share of its visual KV that the request held when it ended."""
        return 1.0 - self.report.get("slots_freed", 0) / self.report.get("visual_tokens", 1)

    @property
    def packed_at(self) -> int | None:
        """Index of the first token that was decoded packed; None for a request that never was."""
        return self.report.get("packed_at", 1) if self.kept < 1.0 else None

    @property
    def packed_early(self) -> bool:
        """Whether it was packed before its answer had ended: one character is one token."""
        return self.packed_at is not None and self.packed_at <= len(self.said)


def check(modes: Sequence[str], rates: Sequence[float]) -> None:
    """Raise ValueError for what cannot be measured."""
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"a mode must be one of {', '.join(MODES)}, got {mode!r}")
    for rate in rates:
        if not 0 < rate < math.inf:
            raise ValueError(f"a rate must be above 0, got {rate:g}")


def body(question: Question, tokens: int) -> dict[str, Any]:
    """A streaming request to /generate, whose answer has `tokens` tokens."""
    pages = question.images()
    # The wording of the checkpoint's chat template.
    text = (
        f"<|im_start|>user\n{PICTURE * len(pages)}{question.prompt}{END}\n<|im_start|>assistant\n"
    )
    return {
        "text": text,
        "image_data": [png_data_url(page) for page in pages],
        "sampling_params": {
            "max_new_tokens": tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "skip_special_tokens": False,
        },
    }


def ask(client: Client, request: Mapping[str, Any], start: float, arrival: float) -> Answer:
    """One request's answer; its clock starts when it was to arrive, sent late or not.

    Raises requests.RequestException where the server is gone.
    """
    first, chunk = None, {}
    try:
        for chunk in client.stream("/generate", request):
            if first is None and chunk["meta_info"]["completion_tokens"]:
                first = time.perf_counter()
    except ServerError as error:
        return Answer(failed=str(error))
    last = time.perf_counter()
    meta = chunk["meta_info"]
    count = meta["completion_tokens"]
    reason = meta["finish_reason"] or {}
    if reason.get("type") != "length" or first is None:
        return Answer(meta=meta, failed=str(reason.get("message") or reason.get("type")))
    pace = (last - first) / max(count - 1, 1)
    return Answer(chunk["text"], first - start - arrival, pace, last - start, meta)


def ask_all(
    client: Client, bodies: Sequence[Mapping[str, Any]], arrivals: Sequence[float]
) -> list[Answer]:
    """Every request in a thread of its own at its moment, whatever became of those before."""
    answers: list[Answer | None] = [None] * len(bodies)
    errors: list[requests.RequestException] = []

    def run(index: int) -> None:
        try:
            answers[index] = ask(client, bodies[index], start, arrivals[index])
        except requests.RequestException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(bodies))]
    start = time.perf_counter()
    for thread, arrival in zip(threads, arrivals, strict=True):
        time.sleep(max(0.0, start + arrival - time.perf_counter()))
        if errors:
            break
        thread.start()
    for thread in threads:
        if thread.ident is not None:
            thread.join()
    if errors:
        raise errors[0]
    return [answer for answer in answers if answer is not None]


def check_mode(mode: str, answers: Sequence[Answer]) -> None:
    """Raise ServerError for answers that the mode's name would belie."""
    for answer in answers:
        if answer.failed:
            continue
        if (mode == "stock") == ("aircache" in answer.meta):
            does = "says nothing of" if mode != "stock" else "runs"
            raise ServerError(f"the server of {mode} {does} aircache")
        reason = answer.meta.get("aircache_reason")
        if mode in ("prefill", "shadow") and answer.kept == 1.0:
            raise ServerError(f"a request in mode {mode} was left alone ({reason})")
        if mode == "pressure" and answer.kept == 1.0 and reason != "no_pressure":
            raise ServerError(f"a request in mode pressure was left alone ({reason})")


def trial(
    client: Client,
    load: Load,
    mode: str,
    rate: float,
    questions: Sequence[Question],
    bodies: Sequence[Mapping[str, Any]],
) -> Row:
    """One mode at one rate, on an empty radix tree.

    in_time: requests within both limits; goodput: those a second, from the first arrival to the
    last end. Failed requests count for neither times nor quality, but as not in time and wrong.
    retractions: times that requests lost their slots to others, `retracted` requests did.
    exact: answers that are right. packed: requests that ended with less than all of their visual
    KV, packed_early those that were packed before their answer ended; kept: the mean share at the
    end. rungs: requests by the rung that they ended at, where the server says.
    Raises ServerError if not one request was answered, or if the answers are not the mode's.
    """
    client.flush_cache()
    answers = ask_all(client, bodies, load.arrivals(rate))
    check_mode(mode, answers)
    whole = [answer for answer in answers if not answer.failed]
    if not whole:
        raise ServerError(f"no request was answered: {answers[0].failed}")
    seconds = max(answer.end for answer in whole)
    right = [
        not answer.failed and bool(exact_match(answer.said, (question.answer,)))
        for question, answer in zip(questions, answers, strict=True)
    ]
    in_time = sum(load.in_time(answer) for answer in answers)
    retractions = [int(answer.meta.get("num_retractions") or 0) for answer in answers]
    rungs = [str(a.report.get("rung")) for a in whole if a.report.get("rung") is not None]
    ttft, tpot = ([getattr(answer, name) for answer in whole] for name in ("ttft", "tpot"))
    return {
        "requests": len(answers),
        "failed": len(answers) - len(whole),
        "tokens": load.tokens,
        "ttft_limit_seconds": load.ttft,
        "tpot_limit_seconds": load.tpot,
        "pool": client.info()["max_total_num_tokens"],
        "mode_flags": " ".join(MODES[mode]),
        "seconds": seconds,
        "requests_per_second": len(whole) / seconds,
        "in_time": in_time,
        "goodput": in_time / seconds,
        "p50_ttft_seconds": float(np.percentile(ttft, 50)),
        "p99_ttft_seconds": float(np.percentile(ttft, 99)),
        "p50_tpot_seconds": float(np.percentile(tpot, 50)),
        "p99_tpot_seconds": float(np.percentile(tpot, 99)),
        "retractions": sum(retractions),
        "retracted": sum(count > 0 for count in retractions),
        "exact": sum(right),
        "packed": sum(answer.kept < 1.0 for answer in whole),
        "packed_early": sum(answer.packed_early for answer in whole),
        "kept": sum(answer.kept for answer in whole) / len(whole),
        "rungs": {rung: rungs.count(rung) for rung in sorted(set(rungs))},
        "answers": [answer.said for answer in answers],
    }


def warm_up(client: Client, bodies: Sequence[Mapping[str, Any]]) -> None:
    """Bring all pages into SGLang's cache of embeddings, and decode a few requests at once.

    The vision tower would take most of a trial, whichever the mode.
    """
    for request in bodies:
        short = {**request["sampling_params"], "max_new_tokens": 1}
        client.post("/generate", {**request, "sampling_params": short})
    few = bodies[:3]
    ask_all(client, few, [0.0] * len(few))


@contextlib.contextmanager
def servers(load: Load, modes: Sequence[str]) -> Iterator[dict[str, Server]]:
    """Of each mode one, side by side."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="aircache-load-"))
        running = {}
        for mode in modes:
            print(f"starting the server: {' '.join(MODES[mode])}", flush=True)
            # SGLang forgets the embeddings of pictures beyond 100 MB.
            env = {"SGLANG_VLM_CACHE_SIZE_MB": "1024"}
            log = Path(folder) / f"{mode}.log"
            flags = [*load.flags(), *MODES[mode]]
            server = Server(CHECKPOINT, flags, env=env, log=log, timeout=1800)
            running[mode] = stack.enter_context(server)
        try:
            yield running
        except (requests.RequestException, psutil.Error):
            for mode, server in running.items():
                if not server.is_running():
                    raise ServerError(
                        f"the server of {mode} has ended\n{server.log_tail()}"
                    ) from None
            raise


def measure(results: Results, load: Load, modes: Sequence[str], rates: Sequence[float]) -> None:
    """Measure what `results` does not have yet, the modes of a rate one after another."""
    missing = [
        (rate, mode)
        for rate, mode in itertools.product(rates, modes)
        if not results.has(key_of(mode, rate))
    ]
    if not missing:
        return
    questions = evaluation_set(KIND, load.requests)
    bodies = [body(question, load.tokens) for question in questions]
    needed = [mode for mode in modes if any(mode == other for _, other in missing)]
    with servers(load, needed) as running:
        for server in running.values():
            warm_up(server, bodies)
        for place, (rate, mode) in enumerate(missing, start=1):
            print(f"[{place}/{len(missing)}] ", end="", flush=True)
            run = functools.partial(trial, running[mode], load, mode, rate, questions, bodies)
            results.measure(key_of(mode, rate), run)


def key_of(mode: str, rate: float) -> Row:
    return {"benchmark": "load", "mode": mode, "rate": rate}
