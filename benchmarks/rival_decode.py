# SPDX-License-Identifier: Apache-2.0
"""Others' decode attention on an uncompressed batch of kernel_cases.py, where it is installed.

Each function plans the batch once and returns the attention of one layer, [bs, H_q, D]. It raises
ImportError where its package is missing, or cannot run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.kernel_cases import Batch, Layer, Timer
from benchmarks.records import Row

SGLANG_KV_SPLITS = 8  # SGLang's default of --triton-attention-num-kv-splits


def text_index(work: Batch) -> tuple[Tensor, Tensor]:
    """kv_indptr and kv_indices, int32, of an uncompressed batch."""
    lengths = work.seq_lens.tolist()
    rows = work.tables.req_to_token[work.req_pool_indices]
    indices = torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])
    indptr = torch.zeros(work.batch + 1, dtype=torch.int32, device=indices.device)
    indptr[1:] = work.seq_lens.cumsum(0)
    return indptr, indices


def flashinfer(work: Batch) -> Layer:
    """FlashInfer's tensor-core decode, page size 1."""
    if work.q.device.type != "cuda":
        raise ImportError("FlashInfer runs on NVIDIA GPUs alone")
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    model = work.model
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=work.q.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    indptr, indices = text_index(work)
    wrapper.plan(
        indptr, indices, torch.ones_like(indptr[1:]),
        model.n_q, model.n_kv, model.head_dim, 1,
        q_data_type=work.dtype, kv_data_type=work.dtype,
    )  # fmt: skip

    def attend(layer: int) -> Tensor:
        pool = (work.k_all[layer].unsqueeze(1), work.v_all[layer].unsqueeze(1))
        result: Tensor = wrapper.run(work.q, pool)
        return result

    return attend


def sglang_triton(work: Batch) -> Layer:
    """SGLang's Triton decode with the split of its backend (attention/triton_backend.py)."""
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
    from sglang.kernels.ops.attention.metadata import get_num_kv_splits_triton

    from aircache_kernels.launch import multiprocessors

    model, batch, device = work.model, work.batch, work.q.device
    heads = (batch, model.n_q, SGLANG_KV_SPLITS)
    logits = torch.empty(*heads, model.head_dim, device=device)
    lse = torch.empty(heads, device=device)
    splits = torch.empty(batch, dtype=torch.int32, device=device)
    uneven = torch.zeros(1, dtype=torch.int32, device=device)
    get_num_kv_splits_triton[(1,)](
        splits, work.seq_lens, batch, 1, model.n_q, model.n_kv, SGLANG_KV_SPLITS,
        multiprocessors(device), MAX_NUM_SEQ=256, uneven_batch_ptr=uneven,
    )  # fmt: skip
    out = torch.empty_like(work.q)
    indptr, indices = text_index(work)
    indices = indices.long()

    def attend(layer: int) -> Tensor:
        decode_attention_fwd(
            work.q, work.k_all[layer], work.v_all[layer], out, indptr, indices,
            logits, lse, splits, SGLANG_KV_SPLITS, model.head_dim**-0.5, 1.0, 1.0,
            uneven_batch=uneven,
        )  # fmt: skip
        return out

    return attend


RIVALS: dict[str, Callable[[Batch], Layer]] = {
    "flashinfer decode": flashinfer,
    "sglang triton decode": sglang_triton,
}


def rival_cases(timer: Timer, work: Batch, like: Row) -> Iterator[Row]:
    """Others' decode of the same uncompressed batch; like: our own row."""
    same = {name: like[name] for name in ("model", "batch", "visual", "retention", "bytes", "flop")}
    for kernel, make in RIVALS.items():
        try:
            attend = make(work)
        except ImportError:
            continue

        def step(attend: Layer = attend) -> None:
            for layer in range(work.model.layers):
                attend(layer)

        row: Row = {"kernel": kernel, **same, "checked": work.is_right(attend)}
        if row["checked"]:
            row["seconds"] = timer(step, graph=True)
            row["ours_over_it"] = like["seconds"] / row["seconds"]
        yield row
