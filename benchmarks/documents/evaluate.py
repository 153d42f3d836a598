# SPDX-License-Identifier: Apache-2.0
"""Scores of the document model in Transformers, with and without its visual KV.

    python -m benchmarks.documents.evaluate --samples 500

An answer is exact when every token, the end included, is the likeliest after the right ones
before it: the same as a greedy answer that is exact. "Hidden" decodes with no visual cell after
the prefill, which still draws the first token from the whole page.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from aircache_sglang.testing.oracle import Oracle
from benchmarks.documents import CHECKPOINT
from benchmarks.documents.questions import KINDS, LARGE, Layout, Question, evaluation_set
from benchmarks.records import provenance

RESULTS = Path(__file__).parent / "results" / "transformers.jsonl"


def text_of(oracle: Oracle, question: Question) -> str:
    """The prompt as the checkpoint's chat template writes it."""
    content = [{"type": "image"}] * len(question.sheets)
    content += [{"type": "text", "text": question.prompt}]
    messages = [{"role": "user", "content": content}]
    return str(oracle.processor.apply_chat_template(messages, add_generation_prompt=True))


def score(oracle: Oracle, kind: str, samples: int, layout: Layout | None) -> dict[str, object]:
    """Shares of exact answers, with the whole cache and with all visual cells hidden."""
    tokenizer = oracle.processor.tokenizer
    layers = oracle.text_config.num_hidden_layers
    nothing = [[()] * oracle.text_config.num_key_value_heads] * layers
    exact = {"full": 0, "hidden": 0}
    for question in evaluation_set(kind, samples, layout=layout):
        inputs = oracle.encode(text_of(oracle, question), question.images())
        answer = tokenizer.encode(question.answer + "<|im_end|>", add_special_tokens=False)
        for name, selection in (("full", None), ("hidden", nothing)):
            trace = oracle.run(inputs, answer, selection)
            exact[name] += trace.logprobs.argmax(-1).tolist() == answer
    return {
        "kind": kind,
        "visual_tokens": int(trace.visual.numel()),
        "samples": samples,
        "exact_match": exact["full"] / samples,
        "exact_match_hidden": exact["hidden"] / samples,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.documents.evaluate")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--samples", type=int, default=500, help="questions a kind (default 500)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="(all)")
    parser.add_argument("--large", action="store_true", help="pages of 1,024 visual tokens too")
    parser.add_argument("--file", type=Path, default=RESULTS, help="rows go here, replacing it")
    arguments = parser.parse_args(argv)
    if arguments.samples < 1:
        parser.error(f"--samples must be at least 1, got {arguments.samples}")
    if not (arguments.checkpoint / "model.safetensors").is_file():
        parser.error(f"{arguments.checkpoint} holds no model: `make train` writes one")
    oracle = Oracle(arguments.checkpoint)
    asked: list[tuple[str, Layout | None]] = [(kind, None) for kind in arguments.kinds]
    if arguments.large:
        asked += [(kind, LARGE[kind]) for kind in arguments.kinds if kind in LARGE]
    rows = []
    for kind, layout in asked:
        started = time.monotonic()
        rows.append(score(oracle, kind, arguments.samples, layout))
        print(json.dumps(rows[-1]), f"{time.monotonic() - started:.0f} s", flush=True)
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "benchmarks.documents.evaluate", *(argv or sys.argv[1:])])
    header = provenance() | {"command": command}
    arguments.file.write_text("".join(json.dumps(row) + "\n" for row in (header, *rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
