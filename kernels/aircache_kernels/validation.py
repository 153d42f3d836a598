# SPDX-License-Identifier: Apache-2.0
"""Checks that every kernel of this package and its oracle share. They read metadata only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from aircache_kernels.tables import Tables

INDEX_DTYPES = (torch.int32, torch.int64)
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FP8_DTYPE = torch.float8_e4m3fn
KV_DTYPES = (*FLOAT_DTYPES, FP8_DTYPE)
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)
MAX_INSTRUCTION = 512
MAX_VISUAL = 131072


def tensor_of(
    name: str,
    value: Tensor,
    shape: Sequence[int | str],
    dtype: torch.dtype | tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> None:
    """Raise ValueError unless `value` has this shape (names match any size), dtype and device."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    fits = value.dim() == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, value.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(value.shape)}")
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if value.dtype not in dtypes:
        wanted = " or ".join(str(item) for item in dtypes)
        raise ValueError(f"{name} must have dtype {wanted}, got {value.dtype}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")


def contiguous(name: str, value: Tensor) -> None:
    if not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(value.stride())}")


def last_dim_contiguous(name: str, value: Tensor) -> None:
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(f"{name} must have stride 1 in its last dimension, got {value.stride(-1)}")


def index_vector(name: str, value: Tensor, size: int | str, device: torch.device) -> None:
    """A contiguous int32 or int64 vector."""
    tensor_of(name, value, (size,), INDEX_DTYPES, device)
    contiguous(name, value)


def table_rows(
    cell_offset: Tensor | None,
    req_pool_indices: Tensor | None,
    n_layers: int,
    batch: int,
    device: torch.device,
) -> None:
    """The compression table and the rows of it that are to be written, or neither."""
    if (cell_offset is None) != (req_pool_indices is None):
        raise ValueError("cell_offset and req_pool_indices must be given together")
    if cell_offset is not None and req_pool_indices is not None:
        tensor_of("cell_offset", cell_offset, ("R", n_layers + 1), torch.int32, device)
        contiguous("cell_offset", cell_offset)
        index_vector("req_pool_indices", req_pool_indices, batch, device)


def pool_of(k_all: Tensor, v_all: Tensor | None = None) -> tuple[int, int, int, int]:
    """Validated (L, rows, H_kv, D) of the KV pool."""
    tensor_of("k_all", k_all, ("L", "rows", "H_kv", "D"), KV_DTYPES)
    last_dim_contiguous("k_all", k_all)
    n_layers, rows, n_kv, head_dim = k_all.shape
    if min(n_layers, rows, n_kv) < 1:
        raise ValueError(f"k_all must not be empty, got shape {list(k_all.shape)}")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim must be one of {list(HEAD_DIMS)}, got {head_dim}")
    if v_all is not None:
        tensor_of("v_all", v_all, tuple(k_all.shape), k_all.dtype, k_all.device)
        last_dim_contiguous("v_all", v_all)
    return n_layers, rows, n_kv, head_dim


def query_group(name: str, n_q: int, n_kv: int) -> int:
    """Query heads of one KV head."""
    if n_q < 1 or n_q % n_kv:
        raise ValueError(f"{name}: H_q must be a multiple of H_kv={n_kv}, got H_q={n_q}")
    return n_q // n_kv


def matching_dtypes(q: Tensor, k_all: Tensor) -> None:
    """Queries and keys share a dtype, or the keys are fp8."""
    if k_all.dtype not in (q.dtype, FP8_DTYPE):
        raise ValueError(
            f"k_all must have dtype {q.dtype} (that of q) or {FP8_DTYPE}, got {k_all.dtype}"
        )


def int_in(name: str, value: int, low: int, high: int | None = None) -> int:
    wanted = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {wanted}, got {value}")
    return value


def finite(name: str, value: float, low: float | None = None, high: float | None = None) -> float:
    number = float(value)
    if (
        not math.isfinite(number)
        or (low is not None and number < low)
        or (high is not None and number > high)
    ):
        raise ValueError(f"{name} must be a finite number in [{low}, {high}], got {value!r}")
    return number


def one_of(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")
    return value


def requests_of(
    tables: Tables, n_layers: int, req_pool_indices: Tensor, seq_lens: Tensor, device: torch.device
) -> int:
    """Validated batch size of what all attention kernels read."""
    n_rows = tables.gap_len.shape[0]
    tensor_of("req_to_token", tables.req_to_token, ("R", "max_context"), torch.int32, device)
    last_dim_contiguous("req_to_token", tables.req_to_token)
    for name, value in (("gap_start", tables.gap_start), ("gap_len", tables.gap_len)):
        tensor_of(name, value, (n_rows,), torch.int32, device)
        contiguous(name, value)
    tensor_of("cell_offset", tables.cell_offset, (n_rows, n_layers + 1), torch.int32, device)
    contiguous("cell_offset", tables.cell_offset)
    index_vector("req_pool_indices", req_pool_indices, "bs", device)
    batch = int_in("batch size", req_pool_indices.shape[0], 1)
    index_vector("seq_lens", seq_lens, batch, device)
    return batch


def attention_of(
    q: Tensor,
    rows: int | str | None,
    k_all: Tensor,
    v_all: Tensor,
    layer: int,
    tables: Tables,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
) -> None:
    """Checks that decode and extend attention share; rows of q: None for one a request."""
    n_layers, _, n_kv, head_dim = pool_of(k_all, v_all)
    device = k_all.device
    batch = requests_of(tables, n_layers, req_pool_indices, seq_lens, device)
    shape = (batch if rows is None else rows, "H_q", head_dim)
    tensor_of("q", q, shape, FLOAT_DTYPES, device)
    last_dim_contiguous("q", q)
    matching_dtypes(q, k_all)
    query_group("q", q.shape[1], n_kv)
    int_in("layer", layer, 0, n_layers - 1)


def flashinfer_rows(n_layers: int, rows: int) -> None:
    """FlashInfer addresses rows with int32."""
    if n_layers * rows >= 2**31:
        raise ValueError(
            f"FlashInfer tables need L * rows < 2**31, got {n_layers} * {rows}; use the triton "
            "decode"
        )
