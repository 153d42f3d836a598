# SPDX-License-Identifier: Apache-2.0
"""A request that is packed when the pool needs it: to the first rung, later to the next.

The pass runs at the end of the prefill as ever and leaves a `Ladder` beside the full KV. The rungs
are nested: a cell that one drops never comes back, and no layer's budget grows. So going down is
copying cells, exactly; nothing is scored again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from aircache_sglang.policy import visual_mass
from aircache_sglang.runtime.decide import Rung
from aircache_sglang.runtime.kv_planes import absolute_rows

# Re-packing moves so many bytes of K, and of V, at a time.
STAGING_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Ladder:
    """What packing needs of one request.

    rungs: K sizes, descending. order: int32 [H_kv, L * m_0], ordinals of the first rung's visual
        tokens, layer after layer, by falling score: the first of each layer are those of every
        later rung. budgets: int64 [K, L], row k adds up to L * m_k.
    reported: budgets, and float64 [K] of `visual_mass`, on their way to the host.
    """

    rungs: tuple[Rung, ...]
    order: Tensor
    budgets: Tensor
    reported: tuple[Tensor, Tensor]

    def selected(self, rung: int) -> Tensor:
        """int64 [H_kv, L * m], ordinals of the tokens that a rung keeps, layer after layer."""
        cells = self.cells(0, rung)
        return self.order.index_select(1, cells).long()

    def cells(self, above: int, rung: int) -> Tensor:
        """int64 [L * m], the cells of a rung by their numbers on a rung above."""
        n_cells = self.budgets.shape[1] * self.rungs[rung].columns
        return nested_cells(self.budgets[above], self.budgets[rung], n_cells)


def make_ladder(
    rungs: tuple[Rung, ...],
    order: Tensor,
    budgets_of: Callable[[int], Tensor],
    importance: Tensor,
    mean: Callable[[Tensor], Tensor],
) -> Ladder:
    """The ladder of one request, without waiting for the device.

    order: int64 [L, H_kv, N_v], ordinals by falling score; budgets_of: int64 [L] for m columns;
    importance: float32 [L, H_kv, N_v] of `visual_mass`; mean: over the tensor-parallel ranks.
    """
    n_layers = order.shape[0]
    budgets: list[Tensor] = []
    for rung in rungs:
        wanted = budgets_of(rung.columns).long()
        budgets.append(nested(wanted, budgets[-1]) if budgets else wanted)
    stacked = torch.stack(budgets)
    selected = cells_of(order, budgets[0], n_layers * rungs[0].columns).to(torch.int32).contiguous()
    ladder = Ladder(rungs, selected, stacked, (stacked, stacked))
    masses = [
        visual_mass(importance, ladder.selected(rung), budget)
        for rung, budget in enumerate(budgets)
    ]
    mass = mean(torch.stack(masses))
    on_host = (stacked.to("cpu", non_blocking=True), mass.to("cpu", non_blocking=True))
    return dataclasses.replace(ladder, reported=on_host)


def nested(budgets: Tensor, above: Tensor) -> Tensor:
    """Budgets of as many cells, none above that of the rung above.

    What the bound takes off goes to the layers with room, in proportion to it. Where both are
    shares of eq. 11 that is a cell of rounding here and there.

    Args:
        budgets: int64 [L]; above: int64 [L], with a sum that is not smaller.
    Returns:
        int64 [L] with the sum of `budgets`. No host sync.
    """
    kept = torch.minimum(budgets, above)
    missing, room = budgets.sum() - kept.sum(), above - kept
    whole = room.sum().clamp_min(1)
    shares, rest = room * missing // whole, room * missing % whole
    rank = torch.empty_like(rest)
    n_layers = torch.arange(len(rest), device=rest.device)
    rank.scatter_(0, rest.argsort(descending=True, stable=True), n_layers)
    return kept + shares + (rank < missing - shares.sum()).long()


def cells_of(order: Tensor, budgets: Tensor, n_cells: int) -> Tensor:
    """The kept tokens in the order of the cells, without a host synchronisation.

    order: int64 [L, H_kv, N_v], ordinals by falling importance; budgets: int64 [L], sum n_cells.
    Returns int64 [H_kv, n_cells]: cell off[l] + j of KV head h holds the token order[l, h, j].
    """
    layer, j = layers_of(budgets, n_cells)
    return order[layer, :, j].transpose(0, 1)


def nested_cells(above: Tensor, budgets: Tensor, n_cells: int) -> Tensor:
    """The cells of one rung by their numbers on another above it.

    above, budgets: int64 [L], the latter with sum n_cells. Returns int64 [n_cells], rising, and
    never below the cell's own number.
    """
    layer, j = layers_of(budgets, n_cells)
    return (above.cumsum(0) - above)[layer] + j


def layers_of(budgets: Tensor, n_cells: int) -> tuple[Tensor, Tensor]:
    """(layer, number within it) of the cells 0 .. n_cells - 1, each int64 [n_cells]."""
    cells = torch.arange(n_cells, device=budgets.device)
    ends = budgets.cumsum(0)
    layer = torch.searchsorted(ends, cells, right=True)
    return layer, cells - (ends - budgets)[layer]


def repack(k_all: Tensor, v_all: Tensor, columns: Tensor, sources: Tensor) -> None:
    """Move cells down to the first ones of their columns, in place, without a host sync.

    k_all, v_all: [L, rows, H_kv, D]; columns: int64 [m] slots of the rung above.
    sources: int64 [C] of `nested_cells`: cell c takes what sources[c] >= c holds. They rise, so
        that a step overwrites nothing that a later one reads.
    """
    n_layers, rows, n_heads, head_dim = k_all.shape
    step = max(1, STAGING_BYTES // (n_heads * head_dim * k_all.itemsize))
    for first in range(0, len(sources), step):
        origin = sources[first : first + step]
        target = torch.arange(first, first + len(origin), device=origin.device)
        origin = absolute_rows(origin, columns, n_layers, rows)
        target = absolute_rows(target, columns, n_layers, rows)
        for cache in (k_all, v_all):
            # torch copies no float8 by index on a CPU
            bits = cache.view(torch.uint8) if cache.itemsize == 1 else cache
            flat = bits.view(n_layers * rows, n_heads * head_dim)
            flat.index_copy_(0, target, flat.index_select(0, origin))
