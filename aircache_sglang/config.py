# SPDX-License-Identifier: Apache-2.0
"""The knobs of the policy: server flags and per-request overrides, validated once.

Pure Python. SGLang's record of flags is read by attribute name, so that this file needs neither
SGLang nor torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Hashable
from typing import Any

# The paper never scores more than a prompt's instruction; contexts of agents can hold far more text
# after the last picture, and eq. 4 is quadratic in it.
INSTRUCTION_LIMIT = 512

# Torch takes counts as int64, and its pools on a GPU add them up in int32.
LARGEST = 2**31 - 1
WIDEST = 2**16 - 1

POLICIES = (
    "aircache",
    "elastic",
    "h2o",
    "mixkv",
    "prefixkv",
    "pyramidkv",
    "random",
    "snapkv",
    "streaming",
    "tgvkv",
    "vlcache",
)
BUDGET_MODES = ("aircache", "uniform", "strength", "skewness", "pyramid", "global")
ELITE_MODES = ("per-head", "shared")
REUSE_MODES = ("exact", "compressed")
GATE_MODES = ("auto", "off")
WHEN_MODES = ("prefill", "pressure")
# The policies that can evict text too: those of the paper's table 6.
UNIFIED = ("aircache", "h2o")
SELECTION_MODES = ("per-head", "shared")
MERGE_MODES = ("position", "similar")
AUDIENCES = ("visual", "all")
# The retentions among which `min_visual_mass` chooses.
MASS_LADDER = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
REQUEST_KEY = "aircache"
REASON_KEY = "aircache_reason"
# The last instruction tokens that vote, of the policies that have a window of their own.
_VOTERS = {"snapkv": 32, "pyramidkv": 8, "mixkv": 32}
_SERVER_ONLY = ("pin_text", "rungs", "shadow", "guard")
# The knobs that some policies do not read; who turns one of them in vain is refused. `alpha` and
# `elite` are read by all, since `visual_mass` is measured by the elite window.
_KNOBS = {
    "budget": ("aircache",),
    "window": ("aircache", *_VOTERS),
    "ablation.floor": ("aircache",),
    "ablation.kernel": tuple(_VOTERS),
    "ablation.seed": ("random",),
    "ablation.sinks": ("streaming",),
    # The others' heads share one selection in any case.
    "ablation.selection": tuple(p for p in POLICIES if p not in ("elastic", "prefixkv", "tgvkv")),
}

_WINDOW_N = re.compile(r"(last|visual)-([1-9][0-9]{0,2})")


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
    """`elite`, `all`, `last-N` or `visual-N`, 1 <= N <= INSTRUCTION_LIMIT (paper table 5)."""
    if isinstance(value, str):
        if value in ("elite", "all"):
            return value
        found = _WINDOW_N.fullmatch(value)
        if found and int(found.group(2)) <= INSTRUCTION_LIMIT:
            return value
    raise ValueError(
        f"{name} must be elite, all, last-N or visual-N with 1 <= N <= {INSTRUCTION_LIMIT}, "
        f"got {value!r}"
    )


def _check_count(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    if value > LARGEST:
        raise ValueError(f"{name} must be an integer <= {LARGEST}, got {value!r}")
    return value


def _check_rungs(name: str, value: Any) -> tuple[float, ...]:
    """Shares that descend, `0.5,0.25,0.1` or a sequence of them; empty for none."""
    parts = value.split(",") if isinstance(value, str) and value else value or ()
    try:
        rungs = tuple(_check_share(name, float(part), zero_allowed=False) for part in parts)
    except (TypeError, ValueError):
        rungs = ()
    if len(rungs) != len(parts) or any(b >= a for a, b in itertools.pairwise(rungs)):
        raise ValueError(f"{name} must be shares that descend, as 0.5,0.25,0.1, got {value!r}")
    return rungs


def _check_odd(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % 2 == 0:
        raise ValueError(f"{name} must be an odd integer >= 1, got {value!r}")
    if value > WIDEST:
        raise ValueError(f"{name} must be an odd integer <= {WIDEST}, got {value!r}")
    return value


def _check_known(name: str, keys: Any, known: list[str]) -> None:
    for key in keys:
        if key not in known:
            raise ValueError(f"{name} has the unknown key {key!r}; known keys: {', '.join(known)}")


def _changed(record: Any, default: Any, prefix: str = "") -> list[str]:
    """Names of the fields that differ, but for `policy` and for a record within the record."""
    fields = [field.name for field in dataclasses.fields(record)]
    return [
        prefix + name
        for name in fields
        if name not in ("policy", "ablation") and getattr(record, name) != getattr(default, name)
    ]


@dataclasses.dataclass(frozen=True, slots=True)
class Ablation:
    """Knobs for experiments, one JSON object (`--aircache-ablation`, the request key `ablation`).

    selection: `per-head`, or `shared`: all KV heads keep the tokens of their mean score.
    merge: share of the dropped tokens that is averaged into the kept ones (paper table 11).
    merge_by: into the kept token at the nearest `position`, or with the most `similar` key.
    rank: the kept tokens begin at this rank instead of 0 (paper figure 4); behind the last rank the
        count goes on at the first.
    seed: of policy `random`. kernel: width of the pool of `snapkv`, `pyramidkv`, `mixkv`, odd.
    sinks: of policy `streaming`.
    floor: share of the columns that budget `global` spreads evenly over the layers; the threshold
        splits the rest.
    audience: what may be evicted, `visual` tokens or `all` of the prompt (paper table 6).
    """

    selection: str = "per-head"
    merge: float = 0.0
    merge_by: str = "position"
    rank: int = 0
    seed: int = 0
    kernel: int = 7
    sinks: int = 4
    floor: float = 0.0
    audience: str = "visual"

    def changed(self, name: str, changes: Any) -> Ablation:
        """Replace the knobs that the object `changes` holds. Raises ValueError that names one."""
        if not isinstance(changes, dict):
            raise ValueError(f"{name} must be an object, got {changes!r}")
        _check_known(name, changes, [field.name for field in dataclasses.fields(self)])
        new = dataclasses.replace(self, **changes)
        return Ablation(
            selection=_check_choice(f"{name}.selection", new.selection, SELECTION_MODES),
            merge=_check_share(f"{name}.merge", new.merge, zero_allowed=True),
            merge_by=_check_choice(f"{name}.merge_by", new.merge_by, MERGE_MODES),
            rank=_check_count(f"{name}.rank", new.rank, 0),
            seed=_check_count(f"{name}.seed", new.seed, 0),
            kernel=_check_odd(f"{name}.kernel", new.kernel),
            sinks=_check_count(f"{name}.sinks", new.sinks, 0),
            floor=_check_share(f"{name}.floor", new.floor, zero_allowed=True),
            audience=_check_choice(f"{name}.audience", new.audience, AUDIENCES),
        )

    @classmethod
    def from_json(cls, name: str, text: Any) -> Ablation:
        """Read a flag's value. Raises ValueError."""
        try:
            changes = json.loads(text)
        except (TypeError, ValueError):
            raise ValueError(f"{name} must be a JSON object, got {text!r}") from None
        return cls().changed(name, changes)


@dataclasses.dataclass(frozen=True, slots=True)
class AirCacheConfig:
    """What decides how one request is compressed.

    policy: one of POLICIES; per request also `none`, which leaves the request alone.
    retention: share of the visual KV that is kept, 0 < r <= 1; 1 leaves the request alone.
    min_visual_mass: keep, in place of `retention`, the smallest share of MASS_LADDER that carries
        so much of the elite attention, and everything if none does (per request only).
    alpha: relevance threshold of eq. 5, 0 <= alpha <= 1.
    budget: what splits the columns over the layers: `global`, one threshold for all of them; or
        the paper's (table 5) `aircache` (eq. 11), `strength` or `skewness` alone, `uniform`,
        `pyramid`.
    window: the observation window (paper table 5): `elite`, `all` text tokens, `last-N`, or the
        `visual-N` last visual tokens. `snapkv`, `pyramidkv` and `mixkv` take `last-N` alone and
        have `last-32`, `last-8` and `last-32` of their own.
    elite: `per-head` reference rows, or the head-mean row `shared` by all heads.
    min_visual_tokens: a request with fewer visual tokens is left alone.
    reuse: what later requests may share: `exact` KV alone, or also the `compressed` replica that a
        turn leaves for the next one.
    gate: `auto` leaves a request alone whose answer is too short to save what the pass costs
        (runtime/gate.py); `off` compresses it all the same.
    when: pack at the end of the `prefill`, or under `pressure`, when the pool needs the slots.
    rungs: shares that a request is packed to one after the other under pressure; the last one is
        `retention`, which alone is the default (server only).
    session_columns: the most columns of one conversation, whose older pictures give way to new
        ones; None for no bound.
    pin_text: share of the KV pool up to which cached text outlasts visual KV (server only).
    shadow: share of the compressed answers that are compared with the full KV (server only).
    guard: share of tokens that may differ before `retention` is raised; None for any (server only).
    ablation: knobs for experiments.
    return_selection: report the kept ordinals in `meta_info` (per request only).
    """

    policy: str = "aircache"
    retention: float = 0.1
    min_visual_mass: float | None = None
    alpha: float = 0.9
    budget: str = "global"
    window: str = "elite"
    elite: str = "per-head"
    min_visual_tokens: int = 64
    reuse: str = "exact"
    gate: str = "auto"
    when: str = "prefill"
    rungs: tuple[float, ...] = ()
    session_columns: int | None = None
    pin_text: float = 0.5
    shadow: float = 0.0
    guard: float | None = None
    ablation: Ablation = Ablation()
    return_selection: bool = False

    def validated(self, prefix: str) -> AirCacheConfig:
        """Check every field but the knobs of `ablation`; `prefix` names them in errors.

        Raises ValueError.
        """

        def name(field: str) -> str:
            if field == "policy" and prefix.startswith("--"):
                return "--kv-policy"
            return prefix + (field.replace("_", "-") if prefix.startswith("--") else field)

        mass = self.min_visual_mass
        if mass is not None:
            mass = _check_share(name("min_visual_mass"), mass, zero_allowed=False)
        config = AirCacheConfig(
            policy=_check_choice(name("policy"), self.policy, ("none", *POLICIES)),
            retention=_check_share(name("retention"), self.retention, zero_allowed=False),
            min_visual_mass=mass,
            alpha=_check_share(name("alpha"), self.alpha, zero_allowed=True),
            budget=_check_choice(name("budget"), self.budget, BUDGET_MODES),
            window=_check_window(name("window"), self.window),
            elite=_check_choice(name("elite"), self.elite, ELITE_MODES),
            min_visual_tokens=_check_count(name("min_visual_tokens"), self.min_visual_tokens),
            reuse=_check_choice(name("reuse"), self.reuse, REUSE_MODES),
            gate=_check_choice(name("gate"), self.gate, GATE_MODES),
            when=_check_choice(name("when"), self.when, WHEN_MODES),
            rungs=_check_rungs(name("rungs"), self.rungs),
            session_columns=None
            if self.session_columns is None
            else _check_count(name("session_columns"), self.session_columns),
            pin_text=_check_share(name("pin_text"), self.pin_text, zero_allowed=True),
            shadow=_check_share(name("shadow"), self.shadow, zero_allowed=True),
            guard=None
            if self.guard is None
            else _check_share(name("guard"), self.guard, zero_allowed=False),
            ablation=self.ablation,
            return_selection=self._check_flag(name("return_selection"), self.return_selection),
        )
        if config.ablation.audience == "all":
            config._check_unified(name)
        if config.when == "pressure":
            config._check_pressure(name)
        if config.session_columns is not None and config.policy != "none":
            config._check_session(name)
        return config

    def _check_guard(self) -> None:
        """Refuse a guard without evidence, and one beside other ladders."""
        for field, good, wanted in (
            ("shadow", self.shadow > 0, "above 0"),
            ("rungs", not self.rungs, "unset"),
            ("session_columns", self.session_columns is None, "unset"),
        ):
            if not good:
                flag = f"--aircache-{field.replace('_', '-')}"
                raise ValueError(f"--aircache-guard needs {flag} {wanted}")

    def _check_session(self, name: Callable[[str], str]) -> None:
        """Refuse what a bounded conversation cannot do, and a bound that holds no picture."""
        flag = name("session_columns")
        for field, good, wanted in (
            ("reuse", self.reuse == "compressed", "compressed"),
            ("when", self.when == "prefill", "prefill"),
            ("policy", self.policy == "aircache", "aircache"),
            ("window", not self._window_of("visual"), "elite, all or last-N"),
            ("min_visual_mass", self.min_visual_mass is None, "unset"),
            ("ablation", self.ablation == Ablation(), "unset"),
        ):
            if not good:
                raise ValueError(f"{flag} needs {name(field)} {wanted}")
        least = max(1, round(self.retention * self.min_visual_tokens))
        if self.session_columns is not None and self.session_columns < least:
            raise ValueError(
                f"{flag} must hold one picture on its smallest rung, that is {least} columns for "
                f"{self.min_visual_tokens} visual tokens at {self.retention}, "
                f"got {self.session_columns}"
            )

    def _check_pressure(self, name: Callable[[str], str]) -> None:
        """Refuse what only the end of the prefill can do: packed later, cells are copied alone."""
        for field, bad in (
            ("ablation", self.ablation.merge > 0 and "merge above 0"),
            ("ablation", self.ablation.audience == "all" and "audience all"),
            ("min_visual_mass", self.min_visual_mass is not None and f"{self.min_visual_mass}"),
        ):
            if bad:
                raise ValueError(
                    f"{name('when')} pressure does not go with {name(field)} {bad}, "
                    "which is for prefill"
                )

    def _check_unified(self, name: Callable[[str], str]) -> None:
        """Refuse what has no meaning once text is evicted too."""
        for field, bad in (
            ("policy", self.policy not in ("none", *UNIFIED)),
            ("reuse", self.reuse != "exact"),
            ("window", self._window_of("visual") > 0),
            ("min_visual_mass", self.min_visual_mass is not None),
        ):
            if bad:
                raise ValueError(
                    f"{name('ablation')} with audience all does not go with {name(field)} "
                    f"{getattr(self, field)}; its policies are {', '.join(UNIFIED)}"
                )

    @staticmethod
    def _check_flag(name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")
        return value

    @classmethod
    def from_server_args(cls, args: Any) -> AirCacheConfig:
        """Read the `aircache_*` fields of a ServerArgs record.

        Raises ValueError for a bad value, and for a flag that was turned from its default and that
        the policy does not read.
        """
        config = cls(
            policy=args.kv_policy,
            retention=args.aircache_retention,
            alpha=args.aircache_alpha,
            budget=args.aircache_budget,
            window=args.aircache_window,
            elite=args.aircache_elite,
            min_visual_tokens=args.aircache_min_visual_tokens,
            reuse=args.aircache_reuse,
            gate=args.aircache_gate,
            when=args.aircache_when,
            rungs=_check_rungs("--aircache-rungs", args.aircache_rungs),
            session_columns=args.aircache_session_columns,
            pin_text=args.aircache_pin_text,
            shadow=args.aircache_shadow,
            guard=args.aircache_guard,
            ablation=Ablation.from_json("--aircache-ablation", args.aircache_ablation),
        )
        if config.rungs:
            config = config._with_rungs(cls().retention)
        config = config.validated("--aircache-")
        if config.guard is not None:
            config._check_guard()
        turned = [*_changed(config, cls()), *_changed(config.ablation, Ablation(), "ablation.")]
        config._check_turned(turned, "--aircache-")
        return config

    def _with_rungs(self, default: float) -> AirCacheConfig:
        """The last rung is the retention, which must not say otherwise."""
        if self.retention not in (default, self.rungs[-1]):
            raise ValueError(
                f"--aircache-rungs ends at {self.rungs[-1]} and --aircache-retention is "
                f"{self.retention}; drop the latter"
            )
        if self.reuse == "compressed" and len(self.rungs) > 1 and self.session_columns is None:
            raise ValueError(
                "--aircache-rungs with more than one rung does not go with --aircache-reuse "
                "compressed, whose replicas are packed once"
            )
        return dataclasses.replace(self, retention=self.rungs[-1])

    def ladder(self) -> tuple[float, ...]:
        """The shares that a request is packed to, one after the other; the last is `retention`.

        A replica is shared, and is packed once.
        """
        if self.when == "prefill" or self.reuse == "compressed":
            return (self.retention,)
        return self.session_rungs()

    def session_rungs(self) -> tuple[float, ...]:
        """The shares that pictures of a bounded conversation go through, at last `retention`."""
        return (*(rung for rung in self.rungs if rung > self.retention), self.retention)

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
        _check_known(f'custom_params["{REQUEST_KEY}"]', overrides, known)
        changes = dict(overrides)
        if "ablation" in changes:
            name = f"{REQUEST_KEY}.ablation"
            changes["ablation"] = self.ablation.changed(name, changes["ablation"])
        config = dataclasses.replace(self, **changes).validated(f"{REQUEST_KEY}.")
        knobs = [f"ablation.{key}" for key in overrides.get("ablation", ())]
        config._check_turned([*overrides, *knobs], f"{REQUEST_KEY}.")
        return config

    def _check_turned(self, names: list[str], prefix: str) -> None:
        """Refuse knobs that were turned and that the policy does not read.

        What a request inherits was turned for the server's policy, and is no fault of its own.
        """
        for name in names:
            takers = _KNOBS.get(name, POLICIES)
            if self.policy not in ("none", *takers):
                raise ValueError(
                    f"{prefix}{name} is a knob of {', '.join(takers)}, not of policy {self.policy}"
                )
        takes_last = self.policy in _VOTERS
        if "window" in names and takes_last and not self._window_of("last"):
            raise ValueError(
                f"{prefix}window must be last-N with policy {self.policy}, got {self.window!r}"
            )
        if "ablation.merge_by" in names and self.ablation.merge == 0:
            raise ValueError(f"{prefix}ablation.merge_by is read with merge above 0 alone")
        if "ablation.floor" in names and self.budget != "global":
            raise ValueError(
                f"{prefix}ablation.floor is read with budget global alone, got {self.budget}"
            )
        if "min_visual_mass" in names and "retention" in names and self.min_visual_mass is not None:
            raise ValueError(
                f"{REQUEST_KEY}.min_visual_mass chooses the retention; drop {REQUEST_KEY}.retention"
            )

    def needs_single_tokens(self) -> str | None:
        """The knob that was turned and that pages of several tokens cannot serve; None for none.

        A conversation's columns move between turns, and where text is evicted too, the end of a
        prompt shares its page with nothing that stays.
        """
        if self.session_columns is not None:
            return "session_columns"
        return "ablation.audience" if self.ablation.audience == "all" else None

    def needs_tree(self) -> str | None:
        """The knob that was turned and that nothing reads without a radix cache; None for none."""
        if self.session_columns is not None:
            return "session_columns"
        return "reuse" if self.reuse == "compressed" else None

    def needs_one_server(self) -> str | None:
        """The knob that was turned and that a prefill and a decode server cannot serve together;
        None for none."""
        for knob, turned in (
            ("min_visual_mass", self.min_visual_mass is not None),
            ("return_selection", self.return_selection),
            ("reuse", self.reuse == "compressed"),
            ("when", self.when == "pressure"),
            ("session_columns", self.session_columns is not None),
            ("ablation.audience", self.ablation.audience == "all"),
        ):
            if turned:
                return knob
        return None

    def variant(self) -> tuple[Hashable, ...]:
        """What two requests must have in common to share one compressed replica."""
        size = self.retention if self.min_visual_mass is None else ("mass", self.min_visual_mass)
        return (
            *(self.policy, size, self.alpha, self.budget, self.window, self.elite),
            *(self.ablation, self.session_columns),
        )

    def scoring_window(self) -> tuple[int, float]:
        """(how many of the last instruction tokens `aircache` looks at, alpha among them).

        `all` and `last-N` are the elite window with alpha 0, which keeps every token (eq. 5).
        """
        if self.window == "all":
            return INSTRUCTION_LIMIT, 0.0
        last = self._window_of("last")
        return (last, 0.0) if last else (INSTRUCTION_LIMIT, self.alpha)

    def scores_are_importance(self) -> bool:
        """Whether the policy's scores are the elite importance, the measure of `visual_mass`."""
        return self.policy == "aircache" and self.window == "elite"

    def observed(self) -> tuple[int, int]:
        """(last instruction tokens, last visual tokens) whose queries score the picture.

        A policy's own window where `window` names no other; all of the instruction for those
        that have none.
        """
        if self.policy == "aircache":
            visual = self._window_of("visual")
            return (0, visual) if visual else (self.scoring_window()[0], 0)
        if self.policy in _VOTERS:
            return self._window_of("last") or _VOTERS[self.policy], 0
        return INSTRUCTION_LIMIT, 0

    def _window_of(self, kind: str) -> int:
        """N where the window is `kind-N`, else 0; kind: `last` or `visual`."""
        found = _WINDOW_N.fullmatch(self.window)
        return int(found.group(2)) if found and found.group(1) == kind else 0
