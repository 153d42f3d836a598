# SPDX-License-Identifier: Apache-2.0
"""Installing the hooks, or refusing: never a server that silently does not compress."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
from sglang.srt.plugins.hook_registry import HookRegistry

from aircache_patches import ledger, process
from aircache_patches.refusal import refuse
from aircache_patches.resolution import register_radix_cache
from aircache_patches.support import unsupported
from aircache_sglang.config import AirCacheConfig

# `make upgrade-check` sets it to the release that it tries: the hooks are then applied to that one.
UPGRADE_CHECK = "AIRCACHE_UPGRADE_CHECK"


def sglang_version() -> str | None:
    """The installed SGLang's version; None without one."""
    try:
        return version("sglang")
    except PackageNotFoundError:
        return None


def checked_config(server_args: Any) -> AirCacheConfig:
    """The flags as a configuration. Raises Refusal that names the bad one."""
    try:
        return AirCacheConfig.from_server_args(server_args)
    except ValueError as error:
        raise refuse(str(error)) from error


def install(policy: str, config: AirCacheConfig, mode: str = "null") -> None:
    """Apply every hook of the ledger, once a process. Raises Refusal if one does not apply.

    mode: the server's --disaggregation-mode.
    """
    if process.is_installed():
        return
    found = sglang_version()
    if found not in ledger.TESTED_VERSIONS and not _is_upgrade_check(found):
        raise refuse(
            f"--kv-policy {policy} is tested with SGLang {', '.join(ledger.TESTED_VERSIONS)}, "
            f"found {found}; install one of these versions, or start without --kv-policy"
        )
    shadow = config.shadow > 0
    missing = ledger.missing_targets(mode, shadow=shadow)
    if not missing:
        for step, wrapper in ledger.resolution_hooks():
            register_resolution_hook(step)(wrapper)
        hooks = ledger.hooks_for(mode, shadow=shadow)
        for hook in hooks:
            HookRegistry.register(hook.target, hook.function, hook.kind)
        # Idempotent; it logs, and goes on, where a target does not fit: hence the check.
        HookRegistry.apply_hooks()
        register_radix_cache()
        missing = [hook.target for hook in hooks if hook.target not in HookRegistry._patched]
    if missing:
        raise refuse(
            f"--kv-policy {policy} needs hooks that this SGLang {found} does not accept: "
            f"{', '.join(missing)}; reinstall SGLang, or start without --kv-policy"
        )
    process.set_policy(policy, config)


def _is_upgrade_check(found: str | None) -> bool:
    if found is None or os.environ.get(UPGRADE_CHECK) != found:
        return False
    # Whatever the log level.
    print(
        f"aircache: SGLANG {found} IS NOT A TESTED VERSION, and its answers may be wrong: "
        f"{UPGRADE_CHECK}={found} lets it start, which is meant for `make upgrade-check` alone "
        f"(tested: {', '.join(ledger.TESTED_VERSIONS)})",
        file=sys.stderr,
        flush=True,
    )
    return True


def refuse_unsupported(server_args: Any) -> None:
    """Raises Refusal for the first flag or model that cannot be served; see support.py."""
    for sentence in unsupported(server_args):
        raise refuse(sentence)
