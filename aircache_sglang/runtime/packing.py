# SPDX-License-Identifier: Apache-2.0
"""Packing: the survivors of all layers, layer after layer, into whole columns.

Which cell goes where is decided by `cell_address` alone.
"""

from __future__ import annotations

import torch


def cell_address(cells: torch.Tensor, n_layers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(column, plane) of packed cells.

    cells: int64, cell numbers c = offset[layer] + j of a request, 0 <= c < L * m.
    The sequential map: column c // L, plane c % L. Every column is full, since the budgets of a
    request add up to L * m.
    """
    return cells // n_layers, cells % n_layers


def absolute_rows(
    cells: torch.Tensor, columns: torch.Tensor, n_layers: int, rows: int
) -> torch.Tensor:
    """int64 rows of `cells` in a pool seen as [L * rows, H_kv, D]; columns: int64 [m] slots."""
    column, plane = cell_address(cells, n_layers)
    return plane * rows + columns[column]


def pack(
    k_all: torch.Tensor,
    v_all: torch.Tensor,
    visual_slots: torch.Tensor,
    columns: torch.Tensor,
    order: torch.Tensor,
    budgets: torch.Tensor,
) -> None:
    """Copy the kept cells of one request into its columns, without a host synchronisation.

    k_all, v_all: [L, rows, H_kv, D].
    visual_slots: int64 [N_v], in the order of the visual tokens; columns: int64 [m], disjoint from
        visual_slots, so that no survivor is overwritten.
    order: int64 [L, H_kv, N_v], ordinals by falling importance; budgets: int64 [L], sum L * m.
    Row j of layer l holds, for each KV head h, the token order[l, h, j].
    """
    n_layers, rows, n_heads, head_dim = k_all.shape
    cells = torch.arange(n_layers * columns.numel(), device=k_all.device)
    ends = budgets.cumsum(0)
    layer = torch.searchsorted(ends, cells, right=True)
    j = cells - (ends - budgets)[layer]
    head = torch.arange(n_heads, device=k_all.device)
    ordinal = order[layer[:, None], head[None, :], j[:, None]]
    source = layer[:, None] * rows + visual_slots[ordinal]
    target = absolute_rows(cells, columns, n_layers, rows)
    for cache in (k_all, v_all):
        flat = cache.view(n_layers * rows, n_heads, head_dim)
        flat[target] = flat[source, head[None, :]]
