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


def cells_of(order: torch.Tensor, budgets: torch.Tensor, n_cells: int) -> torch.Tensor:
    """The kept tokens in the order of the cells, without a host synchronisation.

    order: int64 [L, H_kv, N_v], ordinals by falling importance; budgets: int64 [L], sum n_cells.
    Returns int64 [H_kv, n_cells]: cell off[l] + j of KV head h holds the token order[l, h, j].
    """
    cells = torch.arange(n_cells, device=order.device)
    ends = budgets.cumsum(0)
    layer = torch.searchsorted(ends, cells, right=True)
    j = cells - (ends - budgets)[layer]
    return order[layer, :, j].transpose(0, 1)


def pack(
    k_all: torch.Tensor,
    v_all: torch.Tensor,
    visual_slots: torch.Tensor,
    columns: torch.Tensor,
    selected: torch.Tensor,
    budgets: torch.Tensor,
    source: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Copy the kept cells of one request into its columns, without a host synchronisation.

    k_all, v_all: [L, rows, H_kv, D].
    visual_slots: int64 [N_v], in the order of the visual tokens; columns: int64 [m], disjoint from
        visual_slots, so that no survivor is overwritten.
    selected: int64 [H_kv, L * m] of `cells_of`; budgets: int64 [L], sum L * m.
    source: K and V to copy in place of the visual slots' own, [L, N_v, H_kv, D] each.
    """
    n_layers, rows, n_heads, head_dim = k_all.shape
    n_source, source_slots = rows, visual_slots
    if source is not None:
        n_source = source[0].shape[1]
        source_slots = torch.arange(n_source, device=k_all.device)
    cells = torch.arange(n_layers * columns.numel(), device=k_all.device)
    layer = torch.searchsorted(budgets.cumsum(0), cells, right=True)
    head = torch.arange(n_heads, device=k_all.device)
    origin = layer[:, None] * n_source + source_slots[selected.transpose(0, 1)]
    target = absolute_rows(cells, columns, n_layers, rows)
    origin = (origin * n_heads + head[None, :]).view(-1)
    for cache, original in zip((k_all, v_all), source or (k_all, v_all), strict=True):
        if cache.itemsize == 1:
            # torch copies no float8 by index on a CPU
            cache, original = cache.view(torch.uint8), original.view(torch.uint8)
        # index_select copies whole rows; indexing with tensors goes element by element on a CPU.
        picked = original.view(-1, head_dim).index_select(0, origin)
        flat = cache.view(n_layers * rows, n_heads * head_dim)
        flat.index_copy_(0, target, picked.view(-1, n_heads * head_dim))
