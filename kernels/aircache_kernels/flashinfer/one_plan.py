# SPDX-License-Identifier: Apache-2.0
"""Paged decode by FlashInfer with one plan for all layers.

NOT YET RUN: it needs FlashInfer and an NVIDIA GPU.

FlashInfer's plan is host work and takes the lengths of one layer, while a compressed request has
another length in each. `plan` is called once a step with upper bounds of the lengths; `run` then
points the wrapper at the tables of its layer. On the FA2 tensor-core path this is safe: the kernel
takes kv_len from the indptr on the device, clamps the start of a chunk to it, gives an empty chunk
an LSE of -inf, and the merge ignores it. The CUDA-core kernel underflows there, so it is refused,
as is every backend but fa2 (read in flashinfer 0.7.2, decode.py `plan` and `run`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aircache_kernels import validation as check

_SWAPPED = (
    "_paged_kv_indptr_buf",
    "_paged_kv_indices_buf",
    "_paged_kv_last_page_len_buf",
    "_use_tensor_cores",
    "_backend",
)


class OnePlanDecode:
    """`BatchDecodeWithPagedKVCacheWrapper` that is planned once and run in every layer.

    Holds the wrapper and, from `plan` to the next `plan`, the tables by reference: they must stay
    where they are and hold the step's rows when `run` is called, or a captured graph replays.
    """

    def __init__(
        self,
        workspace: Tensor,
        *,
        n_layers: int,
        rows: int,
        n_q: int,
        n_kv: int,
        head_dim: int,
        q_dtype: torch.dtype,
        kv_dtype: torch.dtype,
        sm_scale: float,
    ) -> None:
        """
        Args:
            workspace: uint8, FlashInfer's float workspace, on the GPU.
            n_layers, rows, n_kv, head_dim: the pool is [n_layers, rows, n_kv, head_dim].
        Raises:
            ValueError: L * rows >= 2**31.
            ImportError: FlashInfer is not installed.
        """
        check.flashinfer_rows(n_layers, rows)
        check.query_group("n_q", n_q, n_kv)
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        self._wrapper: Any = BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True, backend="fa2"
        )
        self._shape = (n_layers * rows, 1, n_kv, head_dim)
        self._n_layers, self._n_q = n_layers, n_q
        self._q_dtype, self._kv_dtype = q_dtype, kv_dtype
        self._sm_scale = float(sm_scale)
        self._tables: tuple[Tensor, Tensor, Tensor] | None = None

    def plan(
        self,
        most_keys: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        last_page_len: Tensor,
    ) -> None:
        """Once a step, on the host.

        Args:
            most_keys: int32 [bs] on the CPU: no layer of request b attends to more keys. For a
                compressed request that is seq_len - N_v + min(N_v, L * m), without a device sync.
            kv_indptr, kv_indices, last_page_len: of `build_flashinfer_tables`, on the GPU.
        """
        check.tensor_of("most_keys", most_keys, ("bs",), torch.int32, torch.device("cpu"))
        batch = most_keys.shape[0]
        check.tensor_of("kv_indptr", kv_indptr, (self._n_layers, batch + 1), torch.int32)
        check.tensor_of("kv_indices", kv_indices, (self._n_layers, "capacity"), torch.int32)
        check.tensor_of("last_page_len", last_page_len, (batch,), torch.int32)
        upper = torch.zeros(batch + 1, dtype=torch.int32)
        upper[1:] = most_keys.cumsum(0)
        self._wrapper.plan(
            upper,
            kv_indices[0],
            torch.ones(batch, dtype=torch.int32),
            self._n_q,
            self._shape[2],
            self._shape[3],
            1,
            q_data_type=self._q_dtype,
            kv_data_type=self._kv_dtype,
            sm_scale=self._sm_scale,
        )
        missing = [name for name in _SWAPPED if not hasattr(self._wrapper, name)]
        if missing:
            raise RuntimeError(f"this FlashInfer keeps its tables elsewhere: no {missing}")
        if not self._wrapper._use_tensor_cores or self._wrapper._backend != "fa2":
            raise RuntimeError(
                f"FlashInfer chose backend {self._wrapper._backend!r} with tensor cores "
                f"{self._wrapper._use_tensor_cores}; one plan is safe on fa2 tensor cores only"
            )
        self._tables = (kv_indptr, kv_indices, last_page_len)

    def run(self, q: Tensor, k_all: Tensor, v_all: Tensor, layer: int) -> Tensor:
        """Attention of one layer, [bs, H_q, D]; k_all and v_all are contiguous [L, rows, ...]."""
        if self._tables is None:
            raise ValueError("run was called before plan")
        check.int_in("layer", layer, 0, self._n_layers - 1)
        kv_indptr, kv_indices, last_page_len = self._tables
        self._wrapper._paged_kv_indptr_buf = kv_indptr[layer]
        self._wrapper._paged_kv_indices_buf = kv_indices[layer]
        self._wrapper._paged_kv_last_page_len_buf = last_page_len
        pool = (k_all.view(self._shape), v_all.view(self._shape))
        result: Tensor = self._wrapper.run(q, pool)
        return result
