# SPDX-License-Identifier: Apache-2.0
"""Questions about several pictures in one batch, inside this process: `sglang.Engine`.

    python -m examples.engine_batch CHECKPOINT PICTURE [PICTURE ...]

Add `--device cpu` on a machine whose GPU must not be used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import sglang

PROMPT = "<|vision_start|><|image_pad|><|vision_end|>"
TEMPLATE = "<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


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

    options = {} if arguments.device is None else {"device": arguments.device}
    engine = sglang.Engine(
        model_path=arguments.checkpoint,
        kv_policy="aircache",
        aircache_retention=arguments.retention,
        **options,
    )
    try:
        found = answers(engine, arguments.pictures, arguments.question, arguments.tokens)
    finally:
        engine.shutdown()
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
