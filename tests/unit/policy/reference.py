# SPDX-License-Identifier: Apache-2.0
"""AirCache section 3 and the papers of its peers, with loops over Python floats: no torch at all.

Every list is nested as [token][head][dim]; scores as [head][token] or [layer][head][token].
"""

from __future__ import annotations

import math
from fractions import Fraction

Vector = list[float]
Heads = list[list[Vector]]

QUOTA_STEP = Fraction(1, 2**20)


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def softmax(logits: Vector) -> Vector:
    top = max(logits)
    powers = [math.exp(logit - top) for logit in logits]
    total = math.fsum(powers)
    return [power / total for power in powers]


def reference_row(q_text: Heads, k_text: Heads, head: int, group: int, scale: float) -> Vector:
    """Eq. 4: the last row of the causal A_tt, which masks nothing."""
    last = q_text[-1][head]
    return softmax([dot(last, key[head // group]) * scale for key in k_text])


def elite_tokens(
    q_text: Heads, k_text: Heads, alpha: float, scale: float, shared: bool = False
) -> list[list[int]]:
    """Eq. 5: for every query head the elite token indices."""
    n_heads, group = len(q_text[0]), len(q_text[0]) // len(k_text[0])
    rows = [reference_row(q_text, k_text, h, group, scale) for h in range(n_heads)]
    if shared:
        mean = [math.fsum(row[j] for row in rows) / n_heads for j in range(len(k_text))]
        rows = [mean] * n_heads
    return [[j for j, p in enumerate(row) if p >= alpha * max(row)] for row in rows]


def importance(
    q_text: Heads,
    k_text: Heads,
    k_visual: Heads,
    alpha: float,
    scale: float,
    shared: bool = False,
    unified: bool = False,
) -> list[Vector]:
    """Eqs. 6 to 8 per query head, then the mean over the query heads of a KV group.

    unified: k_visual are the keys of the whole prompt, of which an elite token sees those up to
    its own, and no others.
    """
    n_heads, n_kv, n_visual = len(q_text[0]), len(k_text[0]), len(k_visual)
    group = n_heads // n_kv
    elites = elite_tokens(q_text, k_text, alpha, scale, shared)
    result = [[0.0] * n_visual for _ in range(n_kv)]
    for head in range(n_heads):
        kv = head // group
        keys = [key[kv] for key in k_visual]
        if not unified:
            keys += [k_text[j][kv] for j in elites[head]]
        for j in elites[head]:
            seen = n_visual - len(q_text) + j + 1 if unified else len(keys)
            attention = softmax([dot(q_text[j][head], key) * scale for key in keys[:seen]])
            for i in range(min(n_visual, seen)):
                result[kv][i] += attention[i] / len(elites[head]) / group
    return result


def strength(scores: list[list[Vector]]) -> Vector:
    """Eq. 9, mean over heads."""
    return [math.fsum(math.fsum(row) for row in layer) / len(layer) for layer in scores]


def head_skewness(row: Vector) -> float:
    """Eq. 10 with the sample standard deviation; 0 where negative, undefined or all equal."""
    n = len(row)
    if n < 3 or max(row) == min(row):
        return 0.0
    mean = math.fsum(row) / n
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in row) / (n - 1))
    total = math.fsum(((x - mean) / deviation) ** 3 for x in row)
    return max(0.0, n / ((n - 1) * (n - 2)) * total)


def skewness(scores: list[list[Vector]]) -> Vector:
    return [math.fsum(head_skewness(row) for row in layer) / len(layer) for layer in scores]


def normalised(values: Vector) -> Vector:
    mean = math.fsum(values) / len(values)
    return [value / mean for value in values] if mean > 0 else [1.0] * len(values)


def shares(scores: list[list[Vector]], budget: str) -> Vector:
    """Eq. 11 without the factor r."""
    by_strength, by_skewness = normalised(strength(scores)), normalised(skewness(scores))
    return {
        "aircache": [(a + b) / 2 for a, b in zip(by_strength, by_skewness, strict=True)],
        "strength": by_strength,
        "skewness": by_skewness,
        "uniform": [1.0] * len(scores),
        "pyramid": pyramid(len(scores)),
    }[budget]


def pyramid(n_layers: int) -> Vector:
    """PyramidKV: an arithmetic sequence from 2 - 1 / 20 down to 1 / 20, mean 1."""
    if n_layers == 1:
        return [1.0]
    first, last = 2 - 1 / 20, 1 / 20
    return [first + (last - first) * i / (n_layers - 1) for i in range(n_layers)]


def quotas(weights: list[Fraction], total: int, cap: int) -> list[Fraction]:
    """Fill in proportion, freeze what breaks a bound on the side that breaks more, and repeat."""
    fixed: dict[int, int] = {}
    if sum(1 for weight in weights if weight > 0) * cap < total - weights.count(Fraction(0)):
        # all layers with a share are full: the rest goes evenly to the others
        fixed = {i: cap for i, weight in enumerate(weights) if weight > 0}
        weights = [Fraction(1)] * len(weights)
    while True:
        free = [i for i in range(len(weights)) if i not in fixed]
        rest = total - sum(fixed.values())
        pool = sum((weights[i] for i in free), Fraction(0))
        plan = {i: weights[i] * rest / pool if pool else Fraction(1) for i in free}
        over = {i: plan[i] - cap for i in free if plan[i] > cap}
        under = {i: 1 - plan[i] for i in free if plan[i] < 1}
        if not over and not under:
            return [Fraction(fixed[i]) if i in fixed else plan[i] for i in range(len(weights))]
        gap = sum(over.values(), Fraction(0)) - sum(under.values(), Fraction(0))
        if gap >= 0:
            fixed.update(dict.fromkeys(over, cap))
        if gap <= 0:
            fixed.update(dict.fromkeys(under, 1))


def largest_remainder(weights: Vector, total: int, cap: int) -> list[int]:
    exact = quotas([Fraction(weight) for weight in weights], total, cap)
    snapped = [round(quota / QUOTA_STEP) * QUOTA_STEP for quota in exact]
    result = [math.floor(quota) for quota in snapped]
    by_remainder = sorted(range(len(result)), key=lambda i: (result[i] - snapped[i], i))
    for i in by_remainder[: total - sum(result)]:
        result[i] += 1
    return result


def layer_budgets(scores: list[list[Vector]], retention: float, budget: str) -> list[int]:
    n_visual = len(scores[0][0])
    m = min(n_visual, max(1, round(retention * n_visual)))
    if budget == "global":
        return global_budgets(scores, m)
    return largest_remainder(shares(scores, budget), m * len(scores), n_visual)


def global_counts(scores: list[list[Vector]], m: int) -> list[Fraction]:
    """Of the L * H * m highest scores, those of each layer; the lowest of them in equal shares."""
    cells = m * len(scores) * len(scores[0])
    lowest = sorted((x for layer in scores for row in layer for x in row), reverse=True)[cells - 1]
    above = [sum(x > lowest for row in layer for x in row) for layer in scores]
    ties = [sum(x == lowest for row in layer for x in row) for layer in scores]
    share = Fraction(cells - sum(above), sum(ties))
    return [a + share * t for a, t in zip(above, ties, strict=True)]


def global_budgets(scores: list[list[Vector]], m: int) -> list[int]:
    counts = [float(count) for count in global_counts(scores, m)]
    return largest_remainder(counts, m * len(scores), len(scores[0][0]))


def select(scores: list[list[Vector]], budgets: list[int]) -> list[list[list[int]]]:
    return [
        [sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]) for row in layer]
        for layer, count in zip(scores, budgets, strict=True)
    ]


def prompt_rows(
    q: Heads, k_before: Heads, k_text: Heads, head: int, group: int, scale: float
) -> list[Vector]:
    """The causal attention rows of the instruction over all before it and itself."""
    keys = [key[head // group] for key in (*k_before, *k_text)]
    return [
        softmax([dot(query[head], key) * scale for key in keys[: len(k_before) + i + 1]])
        for i, query in enumerate(q)
    ]


def votes(
    q: Heads, k_context: Heads, k_visual: Heads, k_text: Heads, window: int, scale: float
) -> list[Vector]:
    """Per query head, the attention that each visual token gets from the last `window` tokens."""
    n_heads, group = len(q[0]), len(q[0]) // len(k_text[0])
    first, last = len(k_context), len(k_context) + len(k_visual)
    result = []
    for head in range(n_heads):
        rows = prompt_rows(q, [*k_context, *k_visual], k_text, head, group, scale)[-window:]
        result.append([math.fsum(row[j] for row in rows) for j in range(first, last)])
    return result


def max_pool(row: Vector, kernel: int) -> Vector:
    half = kernel // 2
    return [max(row[max(0, i - half) : i + half + 1]) for i in range(len(row))]


def over_groups(rows: list[Vector], n_kv: int) -> list[Vector]:
    """Mean over the query heads of each KV group."""
    group = len(rows) // n_kv
    return [
        [math.fsum(column) / group for column in zip(*rows[g * group :][:group], strict=True)]
        for g in range(n_kv)
    ]


def density(
    q: Heads, k_before: Heads, k_text: Heads, scale: float, threshold: float = 0.01
) -> float:
    """VL-Cache: the part of the visible entries that reach `threshold` of their row's highest."""
    n_heads, group = len(q[0]), len(q[0]) // len(k_text[0])
    seen = dense = 0
    for head in range(n_heads):
        for row in prompt_rows(q, k_before, k_text, head, group, scale):
            seen += len(row)
            dense += sum(1 for p in row if p >= threshold * max(row))
    return dense / seen


def text_weighted(
    q: Heads, k_context: Heads, k_visual: Heads, k_text: Heads, scale: float
) -> tuple[list[Vector], float]:
    """TGV-KV: each query head's scores, and what the picture gets, the mean over heads."""
    group, first = len(q[0]) // len(k_text[0]), len(k_context)
    last, n_text = first + len(k_visual), len(q)
    scores, given = [], []
    for head in range(len(q[0])):
        rows = prompt_rows(q, [*k_context, *k_visual], k_text, head, group, scale)
        weights = [
            math.fsum(rows[i][last + j] for i in range(j, n_text)) / (n_text - j)
            for j in range(n_text)
        ]
        scores.append(
            [
                math.fsum(row[v] * w for row, w in zip(rows, weights, strict=True))
                for v in range(first, last)
            ]
        )
        given.append(math.fsum(math.fsum(row[first:last]) for row in rows))
    return scores, math.fsum(given) / len(given)


def mixed(votes: Vector, keys: list[Vector], values: list[Vector]) -> Vector:
    """MixKV: the scores of one KV head; votes: its pooled ones."""

    def levelled(scores: Vector) -> Vector:
        spread = [(s - min(scores)) / (max(scores) - min(scores)) for s in scores]
        factor = math.fsum(votes) / math.fsum(spread)
        return [s * factor for s in spread]

    n = len(keys)
    units = [[x / math.sqrt(dot(key, key)) for x in key] for key in keys]
    cosines = [[dot(a, b) for b in units] for a in units]
    pairs = [cosines[i][j] for i in range(n) for j in range(n) if i != j]
    alike = min(1.0, max(0.0, math.fsum(pairs) / len(pairs)))
    unlike = levelled([-math.fsum(row) / n for row in cosines])
    norms = levelled([math.sqrt(dot(value, value)) for value in values])
    return [
        alike * u + (1 - alike) * (vote + norm)
        for u, vote, norm in zip(unlike, votes, norms, strict=True)
    ]


def received(q: Heads, k: Heads, visual: list[int], scale: float) -> list[Vector]:
    """Per query head, what each visual position gets from all positions of the prompt, summed."""
    n_heads, group = len(q[0]), len(q[0]) // len(k[0])
    result = []
    for head in range(n_heads):
        rows = prompt_rows(q, [], k, head, group, scale)
        result.append([math.fsum(row[j] for row in rows if j < len(row)) for j in visual])
    return result


def prefix_sizes(scores: list[Vector], p: float) -> list[int]:
    """PrefixKV: per layer the shortest prefix of the order whose cumulated priority reaches p."""
    sizes = []
    for layer in scores:
        priority = sorted((x / math.fsum(layer) for x in layer), reverse=True)
        carried, size = 0.0, 0
        while size < len(priority) and (carried < p or size == 0):
            carried += priority[size]
            size += 1
        sizes.append(size)
    return sizes


def prefix_budgets(scores: list[Vector], total: int) -> list[int] | None:
    """Binary search for the p whose sizes add up to `total`; None where a tie skips it."""
    low, high = 0.0, 1.0 + 1e-9
    for _ in range(60):
        p = (low + high) / 2
        sizes = prefix_sizes(scores, p)
        if sum(sizes) == total:
            return sizes
        low, high = (p, high) if sum(sizes) < total else (low, p)
    return None


def merge(
    k: list[Vector],
    v: list[Vector],
    order: list[int],
    budget: int,
    share: float,
    positions: list[int] | None = None,
) -> dict[int, tuple[Vector, Vector]]:
    """Table 11 for one head: kept ordinal to its merged key and value."""
    kept, dropped = sorted(order[:budget]), order[budget:]

    def cosine(a: Vector, b: Vector) -> float:
        return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))

    def closeness(i: int, j: int) -> float:
        return cosine(k[i], k[j]) if positions is None else -abs(positions[i] - positions[j])

    members = {i: [i] for i in kept}
    for i in dropped[: round(share * len(dropped))]:
        members[max(kept, key=lambda j: closeness(i, j))].append(i)

    def mean(rows: list[Vector]) -> Vector:
        return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]

    return {i: (mean([k[j] for j in m]), mean([v[j] for j in m])) for i, m in members.items()}
