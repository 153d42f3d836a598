# SPDX-License-Identifier: Apache-2.0
"""The knobs of the policy: server flags and per-request overrides, validated once.

Pure Python. SGLang's record of flags is read by attribute name, so that this file needs neither
SGLang nor torch.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Hashable
from typing import Any

# The paper never scores more than a prompt's instruction; contexts of agents can hold far more text
# after the last picture, and eq. 4 is quadratic in it.
INSTRUCTION_LIMIT = 512

BUDGET_MODES = ("aircache", "uniform", "strength", "skewness")
ELITE_MODES = ("per-head", "shared")
REUSE_MODES = ("exact", "compressed")
GATE_MODES = ("auto", "off")
REQUEST_KEY = "aircache"
REASON_KEY = "aircache_reason"
_SERVER_ONLY = ("pin_text",)

_LAST_N = re.compile(r"last-([1-9][0-9]{0,2})")


def _check_share(name: str, value: Any, *, zero_allowed: bool) -> float:
    """Return `value` as a float in (0, 1], or in [0, 1] with `zero_allowed`."""
    interval = "0 <= x <= 1" if zero_allowed else "0 < x <= 1"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a number with {interval}, got {value!r}")
    if not (0 <= value <= 1) or (value == 0 and not zero_allowed):
        raise ValueError(f"{name} must be a number with {interval}, got {value!r}")
    return float(value)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return str(value)


def _check_window(name: str, value: Any) -> str:
    """`elite`, `all`, or `last-N` with 1 <= N <= INSTRUCTION_LIMIT (paper table 5)."""
    if isinstance(value, str):
        if value in ("elite", "all"):
            return value
        found = _LAST_N.fullmatch(value)
        if found and int(found.group(1)) <= INSTRUCTION_LIMIT:
            return value
    raise ValueError(
        f"{name} must be elite, all or last-N with 1 <= N <= {INSTRUCTION_LIMIT}, got {value!r}"
    )


def _check_count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return value


@dataclasses.dataclass(frozen=True, slots=True)
class AirCacheConfig:
    """What decides how one request is compressed.

    retention: share of the visual KV that is kept, 0 < r <= 1; 1 leaves the request alone.
    alpha: relevance threshold of eq. 5, 0 <= alpha <= 1.
    budget: what splits the columns over the layers (paper table 5): `aircache` (eq. 11), `uniform`,
        `strength` or `skewness` alone.
    window: the observation window (paper table 5): `elite`, `all` text tokens, or `last-N`.
    elite: `per-head` reference rows, or the head-mean row `shared` by all heads.
    min_visual_tokens: a request with fewer visual tokens is left alone.
    reuse: what later requests may share: `exact` KV alone, or also the `compressed` replica that a
        turn leaves for the next one.
    gate: `auto` leaves a request alone whose answer is too short to save what the pass costs
        (runtime/gate.py); `off` compresses it all the same.
    pin_text: share of the KV pool above which cached text yields before visual KV (server only).
    return_selection: report the kept ordinals in `meta_info` (per request only).
    """

    retention: float = 0.1
    alpha: float = 0.9
    budget: str = "aircache"
    window: str = "elite"
    elite: str = "per-head"
    min_visual_tokens: int = 64
    reuse: str = "exact"
    gate: str = "auto"
    pin_text: float = 0.5
    return_selection: bool = False

    def validated(self, prefix: str) -> AirCacheConfig:
        """Check every field; `prefix` names them in errors. Raises ValueError."""

        def name(field: str) -> str:
            return prefix + (field.replace("_", "-") if prefix.startswith("--") else field)

        return AirCacheConfig(
            retention=_check_share(name("retention"), self.retention, zero_allowed=False),
            alpha=_check_share(name("alpha"), self.alpha, zero_allowed=True),
            budget=_check_choice(name("budget"), self.budget, BUDGET_MODES),
            window=_check_window(name("window"), self.window),
            elite=_check_choice(name("elite"), self.elite, ELITE_MODES),
            min_visual_tokens=_check_count(name("min_visual_tokens"), self.min_visual_tokens),
            reuse=_check_choice(name("reuse"), self.reuse, REUSE_MODES),
            gate=_check_choice(name("gate"), self.gate, GATE_MODES),
            pin_text=_check_share(name("pin_text"), self.pin_text, zero_allowed=True),
            return_selection=self._check_flag(name("return_selection"), self.return_selection),
        )

    @staticmethod
    def _check_flag(name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")
        return value

    @classmethod
    def from_server_args(cls, args: Any) -> AirCacheConfig:
        """Read the `aircache_*` fields of a ServerArgs record. Raises ValueError."""
        return cls(
            retention=args.aircache_retention,
            alpha=args.aircache_alpha,
            budget=args.aircache_budget,
            window=args.aircache_window,
            elite=args.aircache_elite,
            min_visual_tokens=args.aircache_min_visual_tokens,
            reuse=args.aircache_reuse,
            gate=args.aircache_gate,
            pin_text=args.aircache_pin_text,
        ).validated("--aircache-")

    def with_overrides(self, custom_params: Any) -> AirCacheConfig:
        """Apply `custom_params["aircache"]` of one request's sampling parameters.

        Raises ValueError that names the unknown key or the bad value.
        """
        if not isinstance(custom_params, dict) or custom_params.get(REQUEST_KEY) is None:
            return self
        overrides = custom_params[REQUEST_KEY]
        if not isinstance(overrides, dict):
            raise ValueError(f'custom_params["{REQUEST_KEY}"] must be an object, got {overrides!r}')
        known = [field.name for field in dataclasses.fields(self) if field.name not in _SERVER_ONLY]
        for key in overrides:
            if key not in known:
                raise ValueError(
                    f'custom_params["{REQUEST_KEY}"] has the unknown key {key!r}; '
                    f"known keys: {', '.join(known)}"
                )
        return dataclasses.replace(self, **overrides).validated(f"{REQUEST_KEY}.")

    def variant(self) -> tuple[Hashable, ...]:
        """What two requests must have in common to share one compressed replica."""
        return (self.retention, self.alpha, self.budget, self.window, self.elite)

    def scoring_window(self) -> tuple[int, float]:
        """(how many of the last instruction tokens are looked at, alpha that selects among them).

        `all` and `last-N` are the elite window with alpha 0, which keeps every token (eq. 5).
        """
        if self.window == "elite":
            return INSTRUCTION_LIMIT, self.alpha
        if self.window == "all":
            return INSTRUCTION_LIMIT, 0.0
        return int(self.window.removeprefix("last-")), 0.0
