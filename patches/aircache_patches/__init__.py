# SPDX-License-Identifier: Apache-2.0
"""Every hook of this project on SGLang; `ledger.py` is the ordered list, README.md says why.

`register` is the entry point that SGLang's plugin loader calls in each of its processes. It adds
the flags and nothing else: the hooks are installed when a server asks for a policy (`install.py`),
so that a server without one runs SGLang's own functions.
"""

from __future__ import annotations

import sys


def register() -> None:
    """Add `--kv-policy` and its companions to SGLang's arguments.

    SGLang only logs what a plugin raises (plugins/__init__.py, load_plugins), and would go on to
    serve uncompressed, or to complain of an unknown flag. So a failure ends the process if a policy
    was asked for on its command line.
    """
    try:
        from aircache_patches import server_args

        server_args.register()
    except Exception as error:
        if any(argument.split("=")[0] == "--kv-policy" for argument in sys.argv):
            raise SystemExit(
                f"aircache: cannot add its flags to this SGLang ({error!r}); "
                "run `aircache doctor` to see what does not fit"
            ) from error
        raise
