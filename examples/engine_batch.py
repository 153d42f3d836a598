# SPDX-License-Identifier: Apache-2.0
"""Questions about several pictures in one batch, inside this process: `sglang.Engine`.

    python -m examples.engine_batch CHECKPOINT PICTURE [PICTURE ...]

Add `--device cpu` on a machine whose GPU must not be used. The prompt is written as Qwen2-VL's and
Qwen2.5-VL's chat template has it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import sglang

PROMPT = "<|vision_start|><|image_pad|><|vision_end|>"
TEMPLATE = "<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


@contextlib.contextmanager
def engine_of(checkpoint: str, retention: float, device: str | None) -> Iterator[sglang.Engine]:
    """An engine that compresses; shut down at the end."""
    options = {} if device is None else {"device": device}
    engine = sglang.Engine(
        model_path=checkpoint, kv_policy="aircache", aircache_retention=retention, **options
    )
    try:
        yield engine
    finally:
        engine.shutdown()


def answers(
    engine: sglang.Engine, pictures: Sequence[str], question: str, tokens: int
) -> list[dict[str, Any]]:
    """SGLang's answer to each picture: `text` and `meta_info`, which holds `aircache`."""
    return engine.generate(
        prompt=[TEMPLATE.format(content=PROMPT + question)] * len(pictures),
        image_data=[[picture] for picture in pictures],
        sampling_params={"max_new_tokens": tokens, "temperature": 0.0},
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.engine_batch", description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--question", default="What does this page say?")
    parser.add_argument("--retention", type=float, default=0.1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--device", help="SGLang's --device")
    arguments = parser.parse_args(argv)

    with engine_of(arguments.checkpoint, arguments.retention, arguments.device) as engine:
        found = answers(engine, arguments.pictures, arguments.question, arguments.tokens)
    for picture, answer in zip(arguments.pictures, found, strict=True):
        report = answer["meta_info"]["aircache"]
        if report is None:
            print(f"{picture}: left alone")
        else:
            print(
                f"{picture}: {report['visual_tokens']} visual tokens in {report['columns']} "
                f"columns, {report['slots_freed']} slots freed"
            )
        print(f"  {answer['text']}")
    return 0


# The engine starts processes that import this module anew.
if __name__ == "__main__":
    sys.exit(main())
