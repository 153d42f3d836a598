# SPDX-License-Identifier: Apache-2.0
"""What the hooks of one process share: the policy in force, and the compressor.

A scheduler has one model runner, and so one compressor; other processes have none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aircache_sglang.config import AirCacheConfig

if TYPE_CHECKING:
    from aircache_sglang.engine.compressor import Compressor

_policy: tuple[str, AirCacheConfig] | None = None
_compressor: Compressor | None = None


def set_policy(policy: str, config: AirCacheConfig) -> None:
    """Called when all hooks are applied."""
    global _policy
    _policy = (policy, config)


def is_installed() -> bool:
    """Whether the hooks are applied."""
    return _policy is not None


def policy_in_force() -> tuple[str, AirCacheConfig]:
    """The name and the flags that the server was started with."""
    assert _policy is not None, "a hook ran before its installation"
    return _policy


def set_compressor(compressor: Compressor) -> None:
    """Called when the model runner has its attention backend."""
    global _compressor
    _compressor = compressor


def compressor() -> Compressor:
    """The compressor; hooks on the scheduler run only after the model runner is built."""
    assert _compressor is not None, "no model runner has been initialised in this process"
    return _compressor
