# SPDX-License-Identifier: Apache-2.0
"""Start as SGLang's processes do, and print which of its functions are its own.

python -m tests.support.hook_states FLAGS... prints one line of JSON for this process and one for a
process that it spawned, as SGLang spawns its schedulers.
"""

from __future__ import annotations

import json
import multiprocessing
import pkgutil
import sys
from typing import Any


def states() -> dict[str, Any]:
    """Per target of the ledger, whether SGLang's own object is in its place; what we patched.

    Other plugins may be installed beside ours: SGLang's own requirements bring one.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    from aircache_patches import ledger

    original = {}
    for hook in ledger.hooks():
        module, _, attribute = hook.target.rpartition(".")
        found = pkgutil.resolve_name(hook.target)
        owner = pkgutil.resolve_name(module)
        own_module = owner.__module__ if isinstance(owner, type) else owner.__name__
        own = found.__module__ == own_module and found.__name__ == attribute
        if not isinstance(found, type):
            file = sys.modules[own_module].__file__
            own = own and not hasattr(found, "__wrapped__") and found.__code__.co_filename == file
        original[hook.target] = own
    ours = [
        target
        for target in sorted(HookRegistry._patched)
        if any(hook.__module__.startswith("aircache") for _, hook, _ in HookRegistry._hooks[target])
    ]
    return {"original": original, "patched": ours}


def child(server_args: Any) -> None:
    """What a scheduler process does first (managers/scheduler.py, run_scheduler_process)."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    server_args.resolve_once()
    print(json.dumps(states()), flush=True)


def main(argv: list[str]) -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import prepare_server_args

    server_args = prepare_server_args(argv)
    server_args.resolve_once()
    print(json.dumps(states()), flush=True)
    process = multiprocessing.get_context("spawn").Process(target=child, args=(server_args,))
    process.start()
    process.join()
    sys.exit(process.exitcode)


if __name__ == "__main__":
    main(sys.argv[1:])
