# SPDX-License-Identifier: Apache-2.0
"""What is compared: a policy, a retention and knobs; and the grids of the paper's tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# The order of the paper's table 1, then the other policies.
POLICIES = (
    *("h2o", "elastic", "prefixkv", "snapkv", "aircache"),
    *("pyramidkv", "vlcache", "mixkv", "tgvkv", "streaming", "random"),
)
# Raised by whoever changes what a policy answers: rows of an older revision do not count any more.
REVISIONS = {"elastic": 2, "prefixkv": 2, "pyramidkv": 2}
PRUNING = ("fastv", "fastervlm", "ivtp")
FULL, SERVER = "none", "server"
RETENTIONS = (0.5, 0.1, 0.05, 0.02, 0.01)
ALPHAS = (0.99, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
MERGED = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
WINDOWS = ("last-16", "last-32", "all", "visual-32", "elite")  # the paper's
SHORT_WINDOWS = ("last-1", "last-5")
BUDGETS = ("uniform", "pyramid", "strength", "skewness", "aircache")  # the paper's
ALL_BUDGETS = (*BUDGETS, "global")
FLOORS = (0.0, 0.1, 0.25, 0.5)
RANKS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
RANKED = ("h2o", "elastic", "snapkv", "aircache")  # whose ranks figure 4 compares
ONE_TOKEN = 1e-6  # a share of any picture that is one token a layer
LOW = (0.1, 0.01)  # what the paper's ablations are run at
POOLS = (7, 1)
UNIFIED, AUDIENCES = ("h2o", "aircache"), ("all", "visual")  # table 6
UNIFIED_RETENTIONS = (0.5, 0.1, 0.05, 0.01)
# The paper's, sent with every request of AirCache, so that the server's flags do not matter.
DEFAULTS = {"alpha": 0.9, "budget": "aircache", "elite": "per-head", "window": "elite"}


@dataclass(frozen=True)
class Setting:
    """One way of answering.

    policy: of the server; "none" is the full cache, "server" asks for nothing, so that any server
        answers as it was started; or one of PRUNING.
    knobs: overrides that differ from `DEFAULTS`, sorted, so that equal settings are equal.
    """

    policy: str
    retention: float = 1.0
    knobs: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, policy: str, retention: float = 1.0, **knobs: Any) -> Setting:
        if not 0 < retention <= 1:
            raise ValueError(f"retention must be in (0, 1], got {retention}")
        if policy in (FULL, SERVER) and (retention != 1 or knobs):
            raise ValueError(f"policy {policy} takes no retention and no knobs")
        kept = {k: v for k, v in knobs.items() if policy != "aircache" or v != DEFAULTS.get(k)}
        return cls(policy, retention, tuple(sorted(kept.items())))

    def overrides(self) -> dict[str, Any] | None:
        """The request's `custom_params.aircache`; None for nothing."""
        if self.policy == SERVER:
            return None
        if self.policy == FULL:
            return {"retention": 1.0}
        base: dict[str, Any] = {"policy": self.policy, "retention": self.retention}
        # However few tokens the picture and the answer have.
        base |= {"min_visual_tokens": 1, "gate": "off"}
        return base | (DEFAULTS if self.policy == "aircache" else {}) | unfrozen(self.knobs)

    def key(self) -> dict[str, Any]:
        """For a result row: as plain JSON."""
        revision = REVISIONS.get(self.policy, 1)
        newer = {"revision": revision} if revision > 1 else {}
        return {
            **{"policy": self.policy, "retention": self.retention},
            **newer,
            **unfrozen(self.knobs),
        }

    @property
    def compresses(self) -> bool:
        """Whether the server must have compressed the answer."""
        return self.policy not in (FULL, SERVER, *PRUNING) and self.retention < 1


def unfrozen(knobs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Knobs as a request writes them; an `ablation` is an object of its own."""
    return {name: dict(value) if name == "ablation" else value for name, value in knobs}


def rare(**knobs: Any) -> dict[str, Any]:
    """Knobs of `ablation`, without those that have their default; as arguments of `of`.

    A rank stays, 0 too: it is of figure 4 alone.
    """
    default = {
        "merge": 0.0,
        "selection": "per-head",
        "kernel": 7,
        "audience": "visual",
        "floor": 0.0,
    }
    kept = tuple(sorted((k, v) for k, v in knobs.items() if v != default.get(k)))
    return {"ablation": kept} if kept else {}


def merged(share: float, retention: float, by: str = "position") -> Setting:
    """AirCache with a share of the dropped tokens merged."""
    return Setting.of("aircache", retention, **(rare(merge=share, merge_by=by) if share else {}))


def with_floor(floor: float, retention: float) -> Setting:
    """AirCache with budgets from one threshold above an even share."""
    return Setting.of("aircache", retention, budget="global", **rare(floor=floor))


def current(setting: dict[str, Any]) -> bool:
    """Whether a row's setting, see `Setting.key`, is of today's code."""
    return bool(setting.get("revision", 1) == REVISIONS.get(setting["policy"], 1))


def product(policies: Sequence[str], retentions: Sequence[float], **knobs: Any) -> list[Setting]:
    """Every policy at every retention; the full cache and `server` once."""
    return [
        Setting.of(policy) if policy in (FULL, SERVER) else Setting.of(policy, retention, **knobs)
        for policy in policies
        for retention in (retentions[:1] if policy in (FULL, SERVER) else retentions)
    ]


def grid(name: str, policies: Sequence[str], retentions: Sequence[float] | None) -> list[Setting]:
    """The settings of a named grid, the full cache first, in the order in which they are asked.

    Raises:
        ValueError: an unknown name.
    """
    low = retentions or LOW
    # A server that is not ours has no full cache to ask for.
    full = [] if set(policies) == {SERVER} else [Setting.of(FULL)]
    if name == "table1":
        shares = retentions or RETENTIONS
        # Who names policies is asked for those alone.
        ours = ("aircache",) if {*policies} >= {*POLICIES} else ()
        return full + product(policies, shares) + product(ours, shares, budget="global")
    if name == "table4":
        return full + product((*PRUNING, "aircache"), retentions or (0.5, 0.1, 0.01))
    if name == "table5":
        windows = [
            Setting.of("aircache", r, window=w)
            for r in retentions or RETENTIONS[1:]
            for w in (*SHORT_WINDOWS, *WINDOWS)
        ]
        budgets = [Setting.of("aircache", r, budget=b) for r in low for b in BUDGETS]
        return full + windows + budgets
    if name == "cross":
        return full + [
            Setting.of("aircache", r, window=w, budget=b)
            for r in low
            for w in WINDOWS
            for b in BUDGETS
        ]
    if name == "heads":
        return full + [
            Setting.of("aircache", r, elite=e, **rare(selection=s))
            for r in low
            for e in ("per-head", "shared")
            for s in ("per-head", "shared")
        ]
    if name == "table6":
        return full + [
            Setting.of(p, r, **rare(audience=a))
            for r in retentions or UNIFIED_RETENTIONS
            for p in UNIFIED
            for a in AUDIENCES
        ]
    if name == "table11":
        return full + [merged(share, r) for r in low for share in MERGED]
    if name == "similar":
        return full + [merged(share, r, "similar") for r in low for share in MERGED]
    if name == "pooling":
        shares = retentions or RETENTIONS
        return full + [Setting.of("snapkv", r, **rare(kernel=k)) for r in shares for k in POOLS]
    if name == "table12":
        return full + [Setting.of("aircache", r, alpha=a) for r in low for a in ALPHAS]
    if name == "budget":
        shares = retentions or RETENTIONS[1:]
        return full + [Setting.of("aircache", r, budget=b) for r in shares for b in ALL_BUDGETS]
    if name == "floor":
        return full + [with_floor(f, r) for r in retentions or RETENTIONS for f in FLOORS]
    if name == "table13":
        return full + [
            Setting.of("aircache", r, budget=b)
            for r in low
            for b in ("uniform", "strength", "skewness")
        ]
    if name == "figure4":
        ranked = [policy for policy in policies if policy in RANKED]
        return full + [Setting.of(p, ONE_TOKEN, **rare(rank=k)) for p in ranked for k in RANKS]
    if name == "curve":
        shares = retentions or (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
        return full + product(("aircache", "random"), shares)
    raise ValueError(f"the grid must be one of {', '.join(GRIDS)}, got {name!r}")


GRIDS = {
    "table1": "policies at 50, 10, 5, 2 and 1 %",
    "table4": "pruning before or within the prefill against AirCache",
    "table5": "observation windows, then layer budgets",
    "table6": "evicting text too, against visual tokens alone",
    "table11": "merging a share of what is dropped into the nearest kept tokens",
    "similar": "table 11 with the most similar kept keys",
    "table12": "the relevance threshold alpha",
    "budget": "layer budgets, the paper's and from one threshold",
    "floor": "budgets from one threshold, a share of the columns spread evenly",
    "table13": "how far the layer budgets lie apart",
    "figure4": "one visual token a layer, by its rank",
    "pooling": "SnapKV with and without its pool",
    "curve": "AirCache and random selection over the retention",
    "heads": "elite window and selection, each per head or shared by the heads",
    "cross": "every window with every budget",
}
