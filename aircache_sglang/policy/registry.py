# SPDX-License-Identifier: Apache-2.0
"""Policies by name, as `--kv-policy` spells them."""

from __future__ import annotations

from typing import TypeVar

from aircache_sglang.policy.base import Policy

PolicyType = TypeVar("PolicyType", bound=type[Policy])

_POLICIES: dict[str, type[Policy]] = {}


def register_policy(cls: PolicyType) -> PolicyType:
    """Class decorator: make `cls` known under `cls.name`; ValueError where the name is taken."""
    known = _POLICIES.get(cls.name)
    if known is not None and known is not cls:
        raise ValueError(f"policy name {cls.name!r} is taken by {known.__qualname__}")
    _POLICIES[cls.name] = cls
    return cls


def policy_names() -> tuple[str, ...]:
    """The names that `get_policy` knows, sorted."""
    return tuple(sorted(_POLICIES))


def get_policy(name: str, **options: object) -> Policy:
    """A new policy of that name with `options`, which the policy's own class documents.

    Raises:
        ValueError: the name is unknown (the message lists the known ones), or an option is.
    """
    cls = _POLICIES.get(name)
    if cls is None:
        raise ValueError(f"policy must be one of {', '.join(policy_names())}, got {name!r}")
    try:
        return cls(**options)
    except TypeError as error:
        raise ValueError(f"policy {name!r}: {error}") from error
