# SPDX-License-Identifier: Apache-2.0
"""A program in SGLang's frontend language: two questions on each picture, at two retentions.

sglang serve --model-path CHECKPOINT --kv-policy aircache
python -m examples.frontend_program http://127.0.0.1:30000 PICTURE [PICTURE ...]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sglang as sgl

from aircache_sglang.frontend import AirCacheEndpoint

# A list of the figures needs more of the picture than its title does.
QUESTIONS = {
    "title": ("What is the title?", 0.05),
    "figures": ("List all figures.", 0.5),
}


@sgl.function
def read(s: Any, picture: str, tokens: int) -> None:
    """Both questions continue one prompt, whose picture the server computes once."""
    s += sgl.user_begin() + sgl.image(picture)
    branches = s.fork(len(QUESTIONS))
    for branch, (question, retention) in zip(branches, QUESTIONS.values(), strict=True):
        branch["aircache"] = {"retention": retention}
        branch += question + sgl.user_end()
        branch += sgl.assistant(sgl.gen("answer", max_tokens=tokens, temperature=0.0))
    for name, branch in zip(QUESTIONS, branches, strict=True):
        if branch.error() is not None:
            raise RuntimeError(f"the server refused: {branch.error()}")
        s[name] = branch["answer"]
        s[f"{name} meta"] = branch.get_meta_info("answer")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.frontend_program")
    parser.add_argument("url", help="of the server")
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--template", help="SGLang's chat template, if the model's name hides it")
    arguments = parser.parse_args(argv)
    for picture in arguments.pictures:
        if not Path(picture).is_file():
            parser.error(f"{picture} is not a file")

    try:
        backend = AirCacheEndpoint(arguments.url, chat_template_name=arguments.template)
    except (OSError, RuntimeError, ValueError):
        print(f"No SGLang server answers at {arguments.url}.", file=sys.stderr)
        return 1
    programs = [{"picture": picture, "tokens": arguments.tokens} for picture in arguments.pictures]
    try:
        states = read.run_batch(programs, backend=backend)
    except RuntimeError as error:
        print(f"The program stopped: {error}", file=sys.stderr)
        return 1
    for picture, state in zip(arguments.pictures, states, strict=True):
        for name in QUESTIONS:
            # Stock SGLang knows no report.
            report = state[f"{name} meta"].get("aircache")
            kept = "all" if report is None else f"{report['columns']}/{report['visual_tokens']}"
            print(f"{picture}, {name} ({kept} visual slots kept): {state[name]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
