# SPDX-License-Identifier: Apache-2.0
"""Resolve many command lines in one process, and print what became of each as a line of JSON.

python -m tests.support.refusals CASES.json, where the file holds lists of flags.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def outcome(argv: list[str], describe: Callable[[Any], Any] = lambda args: "") -> dict[str, Any]:
    """How SGLang's own parser and resolution end: accepted, refusal, parser or another error.

    describe: makes the message of accepted arguments.
    """
    from sglang.srt.server_args import prepare_server_args

    from aircache_patches.refusal import Refusal

    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            args = prepare_server_args(argv)
            # Idempotent; SGLang resolves in its launcher where the parser does not.
            args.resolve_once()
    except Refusal as refusal:
        return {"kind": "refusal", "message": str(refusal)}
    except SystemExit:
        return {"kind": "parser", "message": stderr.getvalue().strip().splitlines()[-1]}
    except Exception as error:
        return {"kind": type(error).__name__, "message": str(error)}
    return {"kind": "accepted", "message": describe(args)}


def main(path: str) -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    for case in json.loads(Path(path).read_text()):
        environment = case.get("env", {})
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            result = outcome(case["argv"])
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
