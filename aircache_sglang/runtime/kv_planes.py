# SPDX-License-Identifier: Apache-2.0
"""K and V of all layers in one tensor, so that any layer can read any cell."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch


class KVPlanes(ABC):
    """What decode, extension and the pass know of a KV pool; SGLang's is in kv_pool.py.

    k_all, v_all: [L, rows, H_kv, D], the halves of one tensor. Row `slot` of plane `l` is the
        absolute row `l * rows + slot`; slot 0 is the padding slot.
    k_buffer, v_buffer: views [rows, H_kv, D] of them by layer, as SGLang reads and writes them;
        with float8 KV they are raw bytes, while k_all and v_all have the type itself.
    layer_num: layers of this pool, which are all that attend.
    model_layer_ids: the model's number of each, ascending.
    """

    k_all: torch.Tensor
    v_all: torch.Tensor
    k_buffer: list[torch.Tensor]
    v_buffer: list[torch.Tensor]
    layer_num: int
    model_layer_ids: tuple[int, ...]

    def create_planes(
        self,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        store_dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """Allocate zeros; shape: (L, rows, H_kv, D); store_dtype: of as many bytes as dtype."""
        cells = torch.zeros((2, *shape), dtype=store_dtype, device=device)
        self.k_all, self.v_all = cells.view(dtype).unbind(0)
        self.k_buffer, self.v_buffer = (list(half.unbind(0)) for half in cells.unbind(0))

    @property
    def rows(self) -> int:
        """Rows of one plane, the padding slot included."""
        return int(self.k_all.shape[1])

    def plane(self, layer: Any) -> int:
        """The plane of an attending layer, which has `layer_id`."""
        return self.model_layer_ids.index(layer.layer_id)

    @abstractmethod
    def write(self, layer: Any, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store one layer's K and V, [n, H_kv, D] each or flat, in slots [n]."""


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
