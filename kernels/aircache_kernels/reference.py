# SPDX-License-Identifier: Apache-2.0
"""Torch oracles of the kernels: the specification, written to be read.

Plain loops over requests, layers and heads; they wait for the device. `dtype` is the type that the
arithmetic runs in: float64 gives the truth, the inputs' own type what eager code would get.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from aircache_kernels.tables import Tables


def elite_mask_reference(
    q: Tensor,
    qo_indptr: Tensor,
    k_all: Tensor,
    text_indices: Tensor,
    *,
    sm_scale: float,
    alpha: float = 0.9,
    elite: str = "per-head",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Elite instruction tokens (eqs. 4, 5): bool [L, H_q, total_qo]; arguments as in `score`."""
    n_layers, total_qo, n_q, _ = q.shape
    group = n_q // k_all.shape[2]
    mask = torch.zeros(n_layers, n_q, total_qo, dtype=torch.bool, device=q.device)
    bounds = qo_indptr.tolist()
    for start, end in pairwise(bounds):
        if start == end:
            continue
        # [L, n, H_kv, D] -> [L, H_q, n, D]
        keys = k_all[:, text_indices[start:end].long()].to(dtype)
        keys = keys.permute(0, 2, 1, 3).repeat_interleave(group, dim=1)
        logits = torch.matmul(keys, q[:, end - 1].to(dtype).unsqueeze(-1)).squeeze(-1) * sm_scale
        rows = torch.softmax(logits, dim=-1)  # last row of A_tt, [L, H_q, n]
        if elite == "shared":
            rows = rows.mean(dim=1, keepdim=True).expand_as(rows)
        mask[:, :, start:end] = rows >= alpha * rows.amax(dim=-1, keepdim=True)
    return mask


def score_reference(
    q: Tensor,
    qo_indptr: Tensor,
    k_all: Tensor,
    text_indices: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    *,
    sm_scale: float,
    alpha: float = 0.9,
    elite: str = "per-head",
    dtype: torch.dtype = torch.float64,
    elite_mask: Tensor | None = None,
) -> Tensor:
    """Importance (eqs. 4 to 8): [L, H_kv, total_visual] in `dtype`; arguments as in `score`.

    `elite_mask` overrides eqs. 4 and 5, so that errors of eqs. 6 to 8 can be told apart.
    """
    n_layers, _, n_q, _ = q.shape
    n_kv = k_all.shape[2]
    group = n_q // n_kv
    if elite_mask is None:
        elite_mask = elite_mask_reference(
            q, qo_indptr, k_all, text_indices,
            sm_scale=sm_scale, alpha=alpha, elite=elite, dtype=dtype,
        )  # fmt: skip
    out = torch.zeros(n_layers, n_kv, kv_indices.shape[0], dtype=dtype, device=q.device)
    text, visual = qo_indptr.tolist(), kv_indptr.tolist()
    for b in range(len(text) - 1):
        t0, t1, v0, v1 = text[b], text[b + 1], visual[b], visual[b + 1]
        if t0 == t1:
            continue
        for layer in range(n_layers):
            k_text = k_all[layer, text_indices[t0:t1].long()].to(dtype)
            k_visual = k_all[layer, kv_indices[v0:v1].long()].to(dtype)
            for head in range(n_q):
                window = elite_mask[layer, head, t0:t1]
                queries = q[layer, t0:t1, head][window].to(dtype)
                keys = torch.cat((k_visual[:, head // group], k_text[window, head // group]))
                attention = torch.softmax(queries @ keys.T * sm_scale, dim=-1)  # eq. 7
                share = attention[:, : v1 - v0].mean(dim=0)  # eq. 8
                out[layer, head // group, v0:v1] += share / group
    return out


def statistics_reference(importance: Tensor, kv_indptr: Tensor) -> Tensor:
    """Strength and skewness (eqs. 9, 10), float64 [B, 2, L]; arguments as in the kernel."""
    n_layers, n_kv, _ = importance.shape
    bounds = kv_indptr.tolist()
    out = torch.zeros(len(bounds) - 1, 2, n_layers, dtype=torch.float64, device=importance.device)
    for b, (start, end) in enumerate(pairwise(bounds)):
        n = end - start
        for layer in range(n_layers):
            for head in range(n_kv):
                scores = importance[layer, head, start:end].double()
                out[b, 0, layer] += scores.sum() / n_kv
                if n < 3:
                    continue
                spread = scores.max() - scores.min()
                if spread <= 8 * torch.finfo(torch.float32).eps * scores.abs().max():
                    continue
                standard = (scores - scores.mean()) / scores.std(correction=1)
                skewness = n / ((n - 1) * (n - 2)) * standard.pow(3).sum()
                out[b, 1, layer] += skewness.clamp_min(0.0) / n_kv
    return out


def budgets_reference(
    statistics: Tensor, kv_indptr: Tensor, columns: Tensor, *, budget: str = "aircache"
) -> Tensor:
    """Budgets (eq. 11 in whole numbers), int32 [B, L]. Plain Python, by bisection."""
    sizes = (kv_indptr[1:] - kv_indptr[:-1]).tolist()
    rows = [
        _request_budgets(stats.tolist(), n_visual, m, budget)
        for stats, n_visual, m in zip(statistics.cpu(), sizes, columns.tolist(), strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int32, device=statistics.device)


def global_budgets_reference(
    importance: Tensor, kv_indptr: Tensor, columns: Tensor, *, ranks: int = 1
) -> Tensor:
    """Budgets by one threshold a request, int32 [B, L]: its scores sorted, ties shared out.

    importance holds the heads of all ranks.
    """
    n_layers, n_kv, _ = importance.shape
    rows = []
    for (start, end), m in zip(pairwise(kv_indptr.tolist()), columns.tolist(), strict=True):
        scores = importance[:, :, start:end].flatten(1).nan_to_num(nan=-math.inf)
        lowest = scores.flatten().sort(descending=True).values[n_layers * n_kv * m - 1]
        above, ties = (scores > lowest).sum(1), (scores == lowest).sum(1)
        left = n_layers * n_kv * m - above.sum()
        counts = (above + (left * ties).double() / ties.sum()).tolist()
        rows.append(_request_budgets([counts, counts], end - start, m, "strength"))
    return torch.tensor(rows, dtype=torch.int32, device=importance.device)


def _request_budgets(stats: list[list[float]], n_visual: int, m: int, budget: str) -> list[int]:
    n_layers = len(stats[0])
    strength, skewness = (_over_mean(row) for row in stats)
    shares = {
        "aircache": [(a + b) / 2 for a, b in zip(strength, skewness, strict=True)],
        "strength": strength,
        "skewness": skewness,
        "uniform": [1.0] * n_layers,
    }[budget]
    total = n_layers * m
    fed = [l for l in range(n_layers) if shares[l] > 1e-100 * max(shares)]
    starved = [l for l in range(n_layers) if l not in fed]
    quota = [1.0] * n_layers
    if len(fed) * n_visual + len(starved) <= total:
        # all layers with a share are full: the rest evenly to those without
        for l in fed:
            quota[l] = float(n_visual)
        for l in starved:
            quota[l] = (total - len(fed) * n_visual) / len(starved)
    else:
        # in logarithms: shares may lie 100 decades apart
        low, high = 0.5 / max(shares), n_visual / min(shares[l] for l in fed)
        for _ in range(200):
            level = low * math.sqrt(high / low)
            quota = [min(max(level * share, 1.0), float(n_visual)) for share in shares]
            low, high = (level, high) if sum(quota) < total else (low, level)
    quota = [round(value * 2**20) / 2**20 for value in quota]
    cells = [int(value) for value in quota]
    order = sorted(range(n_layers), key=lambda l: (cells[l] - quota[l], l))
    for l in order[: total - sum(cells)]:
        cells[l] += 1
    return cells


def _over_mean(values: list[float]) -> list[float]:
    """s / mean s, or 1 where all are 0. What is not a positive finite number counts as 0."""
    values = [value if 0.0 < value < float("inf") else 0.0 for value in values]
    top = max(values)
    if top == 0.0:
        return [1.0] * len(values)
    scaled = [value / top for value in values]
    mean = sum(scaled) / len(scaled)
    return [value / mean for value in scaled]


def select_reference(importance: Tensor, kv_indptr: Tensor, budgets: Tensor) -> Tensor:
    """Kept ordinals in cell order, int32 [H_kv, L * sum m]; budgets int32 [B, L]."""
    parts: list[Tensor] = []
    bounds = kv_indptr.tolist()
    for b, counts in enumerate(budgets.tolist()):
        for layer, count in enumerate(counts):
            scores = importance[layer, :, bounds[b] : bounds[b + 1]]
            best = scores.argsort(dim=-1, descending=True, stable=True)[:, :count]
            parts.append(best.sort(dim=-1).values)
    return torch.cat(parts, dim=1).to(torch.int32)


def mass_reference(weights: Tensor, kv_indptr: Tensor, selected: Tensor, budgets: Tensor) -> Tensor:
    """Share of the weights that the kept tokens carry, float64 [B, L, H_kv]; as in `select`."""
    bounds, cell = kv_indptr.tolist(), 0
    shares: list[Tensor] = []
    for b, counts in enumerate(budgets.tolist()):
        for layer, count in enumerate(counts):
            mine = weights[layer, :, bounds[b] : bounds[b + 1]].double()
            kept = mine.gather(1, selected[:, cell : cell + count].long()).sum(1)
            total = mine.sum(1)
            shares.append(torch.where(total > 0, kept / total, 1.0).clamp(0.0, 1.0))
            cell += count
    return torch.stack(shares).view(*budgets.shape, -1)


def rows_reference(
    tables: Tables,
    req_pool_indices: Tensor,
    starts: Tensor,
    kv_indptr: Tensor,
    column_indptr: Tensor,
    column_indices: Tensor,
    between_indptr: Tensor,
    between_indices: Tensor,
) -> Tables:
    """Copies of the tables after `lay_out_rows`."""
    after = Tables(*(part.clone() for part in tables))
    columns, between = column_indptr.tolist(), between_indptr.tolist()
    lengths = kv_indptr.diff().tolist()
    for b, (row, start) in enumerate(zip(req_pool_indices.tolist(), starts.tolist(), strict=True)):
        packed = column_indices[columns[b] : columns[b + 1]].tolist()
        text = between_indices[between[b] : between[b + 1]].tolist()
        entries = packed + [0] * (lengths[b] - len(packed)) + text
        entries_on = torch.tensor(entries, dtype=torch.int32)
        after.req_to_token[row, start : start + len(entries)] = entries_on
        after.gap_start[row], after.gap_len[row] = start, lengths[b]
    return after


def cell_address_reference(cell: int, n_layers: int) -> tuple[int, int]:
    """Column (ordinal) and plane of a cell; the sequential map."""
    return divmod(cell, n_layers)


def pack_reference(
    k_all: Tensor,
    v_all: Tensor,
    selected: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    cell_offset: Tensor,
    column_indptr: Tensor,
    column_indices: Tensor,
) -> tuple[Tensor, Tensor]:
    """Copies of k_all and v_all after packing; arguments as in `pack`, any overlap allowed."""
    n_layers, _, n_kv, _ = k_all.shape
    k_new, v_new = k_all.clone(), v_all.clone()
    first, columns = column_indptr.tolist(), column_indices.tolist()
    kv_start, slots = kv_indptr.tolist(), kv_indices.tolist()
    for b, offsets in enumerate(cell_offset.tolist()):
        for layer in range(n_layers):
            for cell in range(offsets[layer], offsets[layer + 1]):
                column, plane = cell_address_reference(cell, n_layers)
                target = columns[first[b] + column]
                for head in range(n_kv):
                    ordinal = int(selected[head, first[b] * n_layers + cell])
                    source = slots[kv_start[b] + ordinal]
                    k_new[plane, target, head] = k_all[layer, source, head]
                    v_new[plane, target, head] = v_all[layer, source, head]
    return k_new, v_new


def physical_rows_reference(
    n_layers: int,
    rows: int,
    layer: int,
    tables: Tables,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
) -> list[Tensor]:
    """Absolute rows (plane * rows + slot) that each request attends to in one layer.

    Text first (tokens outside the gap, in order), then the layer's packed cells.
    """
    found: list[Tensor] = []
    req_to_token, gap_start, gap_len, cell_offset = tables
    requests, lengths = req_pool_indices.tolist(), seq_lens.tolist()
    for request, length in zip(requests, lengths, strict=True):
        table = req_to_token[request].long()
        start, gap = int(gap_start[request]), int(gap_len[request])
        if gap == 0:
            found.append(layer * rows + table[:length])
            continue
        text = layer * rows + torch.cat((table[:start], table[start + gap : length]))
        first, last = cell_offset[request, layer : layer + 2].tolist()
        cells = [cell_address_reference(cell, n_layers) for cell in range(first, last)]
        columns = table[start : start + gap].tolist()
        packed = [plane * rows + columns[column] for column, plane in cells]
        tail = torch.tensor(packed, dtype=torch.int64, device=table.device)
        found.append(torch.cat((text, tail)))
    return found


def extend_attention_reference(
    q: Tensor,
    qo_indptr: Tensor,
    k_all: Tensor,
    v_all: Tensor,
    layer: int,
    tables: Tables,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    *,
    sm_scale: float,
    tree: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Attention of the last tokens of each request, [total_qo, H_q, D].

    Each sees the text up to itself, or what it follows in a tree, and all packed cells; arguments
    as in `extend_attention`.
    """
    n_layers, rows, n_kv, head_dim = k_all.shape
    total, n_q, _ = q.shape
    group = n_q // n_kv
    absolute = physical_rows_reference(n_layers, rows, layer, tables, req_pool_indices, seq_lens)
    n_text = (seq_lens - tables.gap_len[req_pool_indices.long()]).tolist()
    out = torch.zeros(total, n_q, head_dim, dtype=dtype, device=q.device)
    for b, (first, last) in enumerate(pairwise(qo_indptr.tolist())):
        plane, slot = absolute[b] // rows, absolute[b] % rows
        keys = k_all[plane, slot].to(dtype)  # [n, H_kv, D]
        values = v_all[plane, slot].to(dtype)
        keys = keys.repeat_interleave(group, dim=1).transpose(0, 1)
        values = values.repeat_interleave(group, dim=1).transpose(0, 1)
        place = torch.arange(keys.shape[1], device=q.device)
        for token in range(first, last):
            seen = (place <= n_text[b] - (last - token)) | (place >= n_text[b])
            if tree is not None:
                new = slice(n_text[b] - (last - first), n_text[b])
                seen[: new.start] = True
                seen[new] = tree[b, token - first, : last - first]
            logits = torch.matmul(keys, q[token].to(dtype).unsqueeze(-1)).squeeze(-1) * sm_scale
            logits = logits.masked_fill(~seen, float("-inf"))
            weights = torch.softmax(logits, -1).unsqueeze(1)
            out[token] = torch.matmul(weights, values).squeeze(1)
    return out


def decode_attention_reference(
    q: Tensor, k_all: Tensor, v_all: Tensor, layer: int, *requests: Any, **options: Any
) -> Tensor:
    """Attention of one query per request, [bs, H_q, D].

    The extension of each request by one token; arguments as in `decode_attention`.
    """
    one_each = torch.arange(q.shape[0] + 1)
    return extend_attention_reference(q, one_each, k_all, v_all, layer, *requests, **options)
