# SPDX-License-Identifier: Apache-2.0
"""How far compressed answers are from full KV: one comparison, the sums of many, their intervals.

Pure Python: `aircache audit` reads a server's sums without torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist

# Of a two-sided interval of 95 %.
Z = NormalDist().inv_cdf(0.975)
# With fewer requests that differ, or that agree, nothing is known of how requests spread.
FEW = 5
# What the tokens outside a list are taken to have at least, where its sum rounds to 1.
_LEAST_REST = 1e-6


def kl_bound(full: Mapping[int, float], packed: Mapping[int, float]) -> float:
    """A lower bound of KL(full || packed) in nats, from the top log-probabilities by token.

    Tokens that both lists name stand for themselves, all others together for one: lumping never
    raises a divergence. As benchmarks/quality/metrics.py, `token_divergence`.
    """
    common = full.keys() & packed.keys()
    total, rest_full, rest_packed = 0.0, 1.0, 1.0
    for token in common:
        p = math.exp(full[token])
        total += p * (full[token] - packed[token])
        rest_full -= p
        rest_packed -= math.exp(packed[token])
    if rest_full > 0:
        total += rest_full * math.log(rest_full / max(rest_packed, _LEAST_REST))
    return max(0.0, total)


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """One answer beside the distributions that the full KV gives in its place.

    tokens: that were compared; differing: those whose arg max is another; kl: the sum of their
    bounds, see `kl_bound`; first: index in the answer of the first that differs, None for none.
    """

    tokens: float
    differing: float
    kl: float
    first: int | None

    @classmethod
    def of(
        cls,
        full: Sequence[Mapping[int, float]],
        packed: Sequence[Mapping[int, float]],
        indices: Sequence[int],
    ) -> tuple[Comparison, list[float]]:
        """The comparison, and the bound of each token.

        full, packed: for each token the top log-probabilities, not empty; indices: in the answer.
        """
        bounds = [kl_bound(p, q) for p, q in zip(full, packed, strict=True)]
        differ = [
            i
            for i, p, q in zip(indices, full, packed, strict=True)
            if max(p, key=p.__getitem__) != max(q, key=q.__getitem__)
        ]
        first = differ[0] if differ else None
        return cls(len(bounds), len(differ), sum(bounds), first), bounds


@dataclasses.dataclass(slots=True)
class Tally:
    """Sums over requests: n are a request's tokens, d those that differ, k its sum of bounds."""

    requests: int = 0
    same: int = 0
    n: float = 0.0
    d: float = 0.0
    k: float = 0.0
    nn: float = 0.0
    dd: float = 0.0
    kk: float = 0.0
    nd: float = 0.0
    nk: float = 0.0

    def add(self, one: Comparison) -> None:
        n, d, k = one.tokens, one.differing, one.kl
        self.requests += 1
        self.same += d == 0
        for name, value in (
            *(("n", n), ("d", d), ("k", k), ("nn", n * n), ("dd", d * d), ("kk", k * k)),
            *(("nd", n * d), ("nk", n * k)),
        ):
            setattr(self, name, getattr(self, name) + value)

    @classmethod
    def total(cls, tallies: Iterable[Mapping[str, float]]) -> Tally:
        """The sum of several, each as `dataclasses.asdict` gives it."""
        total = cls()
        for one in tallies:
            for field in dataclasses.fields(cls):
                value = getattr(total, field.name) + one[field.name]
                setattr(total, field.name, value)
        return total

    def differing(self, z: float = Z) -> tuple[float, float, float]:
        """(share of tokens that differ, lower, upper bound).

        Wilson's interval over an effective number of tokens (Korn and Graubard 1998): those of one
        request are not independent. Where so few requests differ, or agree, that their spread is
        not known, a request counts as one token.
        """
        if self.n == 0:
            return 0.0, 0.0, 1.0
        p = min(1.0, self.d / self.n)
        variance = self._ratio_variance(p, self.dd, self.nd)
        effective: float = self.requests
        if self.requests > 1 and 0 < p < 1:
            effective = min(self.n, p * (1 - p) / max(variance, 1e-30))
            if min(self.same, self.requests - self.same) < FEW:
                effective = min(effective, self.requests)
        return p, *wilson(p, effective, z)

    def same_answers(self, z: float = Z) -> tuple[float, float, float]:
        """(share of requests without a different token, lower, upper bound), Wilson's interval."""
        if self.requests == 0:
            return 0.0, 0.0, 1.0
        p = self.same / self.requests
        return p, *wilson(p, self.requests, z)

    def mean_kl(self, z: float = Z) -> tuple[float, float, float]:
        """(mean bound a token in nats, lower, upper bound), normal over requests."""
        if self.n == 0:
            return 0.0, 0.0, math.inf
        mean = self.k / self.n
        if self.requests < 2:
            return mean, 0.0, math.inf
        half = z * math.sqrt(max(0.0, self._ratio_variance(mean, self.kk, self.nk)))
        return mean, max(0.0, mean - half), mean + half

    def _ratio_variance(self, ratio: float, squares: float, cross: float) -> float:
        """Of sum(x) / sum(n) over requests, to first order (Cochran 1977, eq. 6.13)."""
        if self.requests < 2:
            return 0.0
        residuals = squares - 2 * ratio * cross + ratio * ratio * self.nn
        return self.requests / (self.requests - 1) * residuals / (self.n * self.n)


def wilson(p: float, n: float, z: float) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share p among n."""
    if n <= 0:
        return 0.0, 1.0
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
