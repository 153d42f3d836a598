# SPDX-License-Identifier: Apache-2.0
"""Importance of visual tokens: eqs. 4 to 8 for all layers and requests, in three launches.

1. `_elite_fwd_kernel`: last row of A_tt, elite mask, list of elite rows (eqs. 4, 5).
2. `_lse_fwd_kernel`: log-sum-exp of every elite row, split over the visual tokens (eqs. 6, 7).
3. `_importance_fwd_kernel`: merges the splits, means over elite rows and the KV group (eq. 8).

No N_t x N_v matrix is stored. Scratch, freed on return, for R = L * H_q * total_qo possible rows:
R bytes (mask) + 4 R (rows) + 4 * splits * R (log-sum-exp) + 4 * L * B * H_q (counts), splits <= 32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aircache_kernels import validation as check
from aircache_kernels.launch import INTERPRETED, dot_dtype, power_of_2

# Sizes that differ from batch to batch are `do_not_specialize`: Triton would compile anew for those
# that 16 divides, while requests wait.
ELITE_MODES = ("per-head", "shared")
_BLOCK_H = 16  # query heads of a tile, the least tl.dot takes
_MAX_SPLITS = 32
_CHUNK = 1024  # visual tokens of a split; more where a request has more than _MAX_SPLITS of them


@triton.jit
def _reference_rows(  # type: ignore[no-untyped-def]
    q, k_all, slots, layer, last, kv_head, first, n,
    stride_ql, stride_qt, stride_qh, stride_kl, stride_kr, stride_kh, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, STEP_D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Softmax of the last instruction token over the instruction, [BLOCK_H, BLOCK_T]."""
    local = first + tl.arange(0, BLOCK_H)
    heads = kv_head * GROUP + local
    t = tl.arange(0, BLOCK_T)
    logits = tl.zeros([BLOCK_H, BLOCK_T], dtype=tl.float32)
    # head_dim in steps: the whole [D, 512] key tile would not fit shared memory
    for d0 in tl.static_range(0, BLOCK_D, STEP_D):
        d = d0 + tl.arange(0, STEP_D)
        q_at = layer * stride_ql + last * stride_qt + heads[:, None] * stride_qh + d[None, :]
        q_tile = tl.load(
            q + q_at, mask=(local[:, None] < GROUP) & (d[None, :] < HEAD_DIM), other=0.0
        )
        k_at = layer * stride_kl + slots[None, :] * stride_kr + kv_head * stride_kh + d[:, None]
        k_tile = tl.load(k_all + k_at, mask=(t[None, :] < n) & (d[:, None] < HEAD_DIM), other=0.0)
        logits += tl.dot(q_tile.to(DOT), k_tile.to(DOT), input_precision="ieee")
    logits = tl.where(t[None, :] < n, logits * scale, float("-inf"))
    top = tl.max(logits, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(logits - top[:, None])
    total = tl.sum(weight, 1)
    return weight / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _store_elite(  # type: ignore[no-untyped-def]
    elite, mask_out, rows_out, counts_out, layer, b, batch, start, n, total_qo, kv_head, first,
    H_Q: tl.constexpr, GROUP: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Mask, counts and the compact row list (head * 1024 + token) of one tile of heads."""
    local = first + tl.arange(0, BLOCK_H)
    heads = kv_head * GROUP + local
    t = tl.arange(0, BLOCK_T)
    inside = (local[:, None] < GROUP) & (t[None, :] < n)
    elite = elite & inside
    mask_at = (layer * H_Q + heads[:, None]) * total_qo + start + t[None, :]
    tl.store(mask_out + mask_at, elite.to(tl.int8), mask=inside)
    chosen = elite.to(tl.int32)
    counts = tl.sum(chosen, 1)
    tl.store(counts_out + (layer * batch + b) * H_Q + heads, counts, mask=local < GROUP)
    before = tl.cumsum(counts, 0) - counts
    position = before[:, None] + tl.cumsum(chosen, 1) - 1
    region = layer * H_Q * total_qo + H_Q * start + (kv_head * GROUP + first) * n
    tl.store(rows_out + region + position, heads[:, None] * 1024 + t[None, :], mask=elite)


@triton.jit(do_not_specialize=["total_qo"])
def _elite_fwd_kernel(  # type: ignore[no-untyped-def]
    q, qo_indptr, k_all, text_indices, mask_out, rows_out, counts_out,
    stride_ql, stride_qt, stride_qh, stride_kl, stride_kr, stride_kh,
    total_qo, scale, alpha,
    H_Q: tl.constexpr, H_KV: tl.constexpr, GROUP: tl.constexpr, HEAD_TILES: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    STEP_D: tl.constexpr, SHARED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """grid (H_kv * head tiles, or 1 where shared; B; L)"""
    b = tl.program_id(1)
    batch = tl.num_programs(1)
    layer = tl.program_id(2).to(tl.int64)
    start = tl.load(qo_indptr + b).to(tl.int64)
    n = (tl.load(qo_indptr + b + 1) - start).to(tl.int32)
    t = tl.arange(0, BLOCK_T)
    slots = tl.load(text_indices + start + t, mask=t < n, other=0).to(tl.int64)
    # an empty instruction reads row 0 and stores nothing
    last = tl.maximum(start + n - 1, 0)
    if SHARED:
        mean = tl.zeros([BLOCK_T], dtype=tl.float32)
        for tile in range(0, H_KV * HEAD_TILES):
            kv_head = tile // HEAD_TILES
            first = (tile % HEAD_TILES) * BLOCK_H
            rows = _reference_rows(
                q, k_all, slots, layer, last, kv_head, first, n,
                stride_ql, stride_qt, stride_qh, stride_kl, stride_kr, stride_kh, scale,
                GROUP, HEAD_DIM, BLOCK_H, BLOCK_T, BLOCK_D, STEP_D, DOT,
            )  # fmt: skip
            local = first + tl.arange(0, BLOCK_H)
            mean += tl.sum(tl.where(local[:, None] < GROUP, rows, 0.0), 0)
        mean = mean / H_Q
        elite_row = mean >= alpha * tl.max(mean, 0)
        for tile in range(0, H_KV * HEAD_TILES):
            kv_head = tile // HEAD_TILES
            first = (tile % HEAD_TILES) * BLOCK_H
            every = tl.arange(0, BLOCK_H) >= 0
            _store_elite(
                every[:, None] & elite_row[None, :], mask_out, rows_out, counts_out,
                layer, b, batch, start, n, total_qo, kv_head, first,
                H_Q, GROUP, BLOCK_H, BLOCK_T,
            )  # fmt: skip
    else:
        tile = tl.program_id(0)
        kv_head = tile // HEAD_TILES
        first = (tile % HEAD_TILES) * BLOCK_H
        rows = _reference_rows(
            q, k_all, slots, layer, last, kv_head, first, n,
            stride_ql, stride_qt, stride_qh, stride_kl, stride_kr, stride_kh, scale,
            GROUP, HEAD_DIM, BLOCK_H, BLOCK_T, BLOCK_D, STEP_D, DOT,
        )  # fmt: skip
        elite = rows >= alpha * tl.max(rows, 1)[:, None]
        _store_elite(
            elite, mask_out, rows_out, counts_out,
            layer, b, batch, start, n, total_qo, kv_head, first,
            H_Q, GROUP, BLOCK_H, BLOCK_T,
        )  # fmt: skip


@triton.jit
def _online(logits, top, total):  # type: ignore[no-untyped-def]
    """Running maximum and sum of exponentials; rows without a key so far stay at -inf and 0."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    total = total * tl.exp(top - safe) + tl.sum(tl.exp(logits - safe[:, None]), 1)
    return new_top, total


@triton.jit
def _elite_queries(  # type: ignore[no-untyped-def]
    q, rows, region, r0, n_rows, layer, start, stride_ql, stride_qt, stride_qh,
    HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Head of each elite row of a tile, and its query [BLOCK_R, BLOCK_D]."""
    r = r0 + tl.arange(0, BLOCK_R)
    code = tl.load(rows + region + r, mask=r < n_rows, other=0)
    heads = code // 1024
    d = tl.arange(0, BLOCK_D)
    at = layer * stride_ql + (start + code % 1024)[:, None] * stride_qt
    at += heads[:, None] * stride_qh + d[None, :]
    tile = tl.load(q + at, mask=(r[:, None] < n_rows) & (d[None, :] < HEAD_DIM), other=0.0)
    return heads, tile


@triton.jit
def _keys(  # type: ignore[no-untyped-def]
    k_all, indices, at, inside, head_base, stride_kr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """K of one head in the slots indices[at], [BLOCK_D, BLOCK_N]; inside: bool [BLOCK_N]."""
    d = tl.arange(0, BLOCK_D)
    slots = tl.load(indices + at, mask=inside, other=0).to(tl.int64)
    return tl.load(
        k_all + head_base + slots[None, :] * stride_kr + d[:, None],
        mask=inside[None, :] & (d[:, None] < HEAD_DIM),
        other=0.0,
    )


@triton.jit(do_not_specialize=["total_qo", "total_rows"])
def _lse_fwd_kernel(  # type: ignore[no-untyped-def]
    q, qo_indptr, k_all, text_indices, kv_indptr, kv_indices, elite_mask, rows, counts, lse_out,
    stride_ql, stride_qt, stride_qh, stride_kl, stride_kr, stride_kh,
    total_qo, total_rows, scale,
    H_Q: tl.constexpr, GROUP: tl.constexpr, HEAD_TILES: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_S: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """grid (splits, B, L * H_kv * head tiles); the last splits of a short request are empty"""
    split = tl.program_id(0)
    b = tl.program_id(1)
    batch = tl.num_programs(1)
    tile = tl.program_id(2)
    kv_tiles: tl.constexpr = (H_Q // GROUP) * HEAD_TILES
    layer = (tile // kv_tiles).to(tl.int64)
    kv_head = (tile % kv_tiles) // HEAD_TILES
    first = (tile % HEAD_TILES) * BLOCK_H
    start = tl.load(qo_indptr + b).to(tl.int64)
    n_text = (tl.load(qo_indptr + b + 1) - start).to(tl.int32)
    kv_start = tl.load(kv_indptr + b).to(tl.int64)
    n_visual = (tl.load(kv_indptr + b + 1) - kv_start).to(tl.int32)
    local = first + tl.arange(0, BLOCK_H)
    per_head = tl.load(
        counts + (layer * batch + b) * H_Q + kv_head * GROUP + local, mask=local < GROUP, other=0
    )
    n_rows = tl.sum(per_head, 0)
    region = layer * H_Q * total_qo + H_Q * start + (kv_head * GROUP + first) * n_text
    chunk = tl.cdiv(n_visual, CHUNK * BLOCK_S) * CHUNK
    v_begin = split * chunk
    v_end = tl.minimum(v_begin + chunk, n_visual)
    head_base = layer * stride_kl + kv_head * stride_kh
    for r0 in range(0, n_rows, BLOCK_R):
        heads, q_tile = _elite_queries(
            q, rows, region, r0, n_rows, layer, start, stride_ql, stride_qt, stride_qh,
            HEAD_DIM, BLOCK_R, BLOCK_D,
        )  # fmt: skip
        q_tile = q_tile.to(DOT)
        r = r0 + tl.arange(0, BLOCK_R)
        top = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_R], dtype=tl.float32)
        # the elite text keys of the row's own head count once, in the first split
        text_end = tl.where(split == 0, n_text, 0)
        for t0 in range(0, text_end, BLOCK_N):
            t = t0 + tl.arange(0, BLOCK_N)
            k_tile = _keys(
                k_all, text_indices, start + t, t < n_text, head_base, stride_kr, HEAD_DIM, BLOCK_D
            )
            logits = tl.dot(q_tile, k_tile.to(DOT), input_precision="ieee") * scale
            inside = (r[:, None] < n_rows) & (t[None, :] < n_text)
            elite = tl.load(
                elite_mask + (layer * H_Q + heads[:, None]) * total_qo + start + t[None, :],
                mask=inside,
                other=0,
            )
            top, total = _online(tl.where(elite != 0, logits, float("-inf")), top, total)
        for v0 in range(v_begin, v_end, BLOCK_N):
            v = v0 + tl.arange(0, BLOCK_N)
            k_tile = _keys(
                k_all, kv_indices, kv_start + v, v < v_end, head_base, stride_kr, HEAD_DIM, BLOCK_D
            )
            logits = tl.dot(q_tile, k_tile.to(DOT), input_precision="ieee") * scale
            top, total = _online(tl.where(v[None, :] < v_end, logits, float("-inf")), top, total)
        seen = total > 0.0
        lse = tl.where(seen, top + tl.log(tl.where(seen, total, 1.0)), float("-inf"))
        tl.store(lse_out + split.to(tl.int64) * total_rows + region + r, lse, mask=r < n_rows)


@triton.jit(do_not_specialize=["total_qo", "total_rows", "total_visual", "splits"])
def _importance_fwd_kernel(  # type: ignore[no-untyped-def]
    q, qo_indptr, k_all, kv_indptr, kv_indices, rows, counts, lse_in, out,
    stride_ql, stride_qt, stride_qh, stride_kl, stride_kr, stride_kh,
    total_qo, total_rows, total_visual, splits, scale,
    H_Q: tl.constexpr, GROUP: tl.constexpr, HEAD_TILES: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """grid (visual tiles, B, L * H_kv)"""
    b = tl.program_id(1)
    batch = tl.num_programs(1)
    n_kv: tl.constexpr = H_Q // GROUP
    layer = (tl.program_id(2) // n_kv).to(tl.int64)
    kv_head = tl.program_id(2) % n_kv
    start = tl.load(qo_indptr + b).to(tl.int64)
    n_text = (tl.load(qo_indptr + b + 1) - start).to(tl.int32)
    kv_start = tl.load(kv_indptr + b).to(tl.int64)
    n_visual = (tl.load(kv_indptr + b + 1) - kv_start).to(tl.int32)
    v0 = tl.program_id(0) * BLOCK_N
    if v0 < n_visual:
        v = v0 + tl.arange(0, BLOCK_N)
        s = tl.arange(0, BLOCK_S)
        head_base = layer * stride_kl + kv_head * stride_kh
        k_tile = _keys(
            k_all, kv_indices, kv_start + v, v < n_visual, head_base, stride_kr, HEAD_DIM, BLOCK_D
        ).to(DOT)
        scores = tl.zeros([BLOCK_N], dtype=tl.float32)
        for tile in range(0, HEAD_TILES):
            first = tile * BLOCK_H
            count_base = (layer * batch + b) * H_Q
            local = first + tl.arange(0, BLOCK_H)
            per_head = tl.load(
                counts + count_base + kv_head * GROUP + local, mask=local < GROUP, other=0
            )
            n_rows = tl.sum(per_head, 0)
            region = layer * H_Q * total_qo + H_Q * start + (kv_head * GROUP + first) * n_text
            for r0 in range(0, n_rows, BLOCK_R):
                heads, q_tile = _elite_queries(
                    q, rows, region, r0, n_rows, layer, start, stride_ql, stride_qt, stride_qh,
                    HEAD_DIM, BLOCK_R, BLOCK_D,
                )  # fmt: skip
                r = r0 + tl.arange(0, BLOCK_R)
                part = tl.load(
                    lse_in + s[:, None].to(tl.int64) * total_rows + region + r[None, :],
                    mask=(s[:, None] < splits) & (r[None, :] < n_rows),
                    other=float("-inf"),
                )
                top = tl.max(part, 0)
                safe = tl.where(top == float("-inf"), 0.0, top)
                total = tl.sum(tl.exp(part - safe[None, :]), 0)
                lse = safe + tl.log(tl.where(r < n_rows, total, 1.0))
                count = tl.load(counts + count_base + heads, mask=r < n_rows, other=1)
                weight = tl.where(r < n_rows, 1.0 / (count * GROUP).to(tl.float32), 0.0)
                logits = tl.dot(q_tile.to(DOT), k_tile, input_precision="ieee") * scale
                probability = tl.exp(logits - lse[:, None])
                # rows past the end have q = 0 and weight 0
                scores += tl.sum(probability * weight[:, None], 0)
        out_at = tl.program_id(2).to(tl.int64) * total_visual + kv_start + v
        tl.store(out + out_at, scores, mask=v < n_visual)


def score(
    q: Tensor,
    qo_indptr: Tensor,
    k_all: Tensor,
    text_indices: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    *,
    max_qo_len: int,
    max_kv_len: int,
    sm_scale: float,
    alpha: float = 0.9,
    elite: str = "per-head",
) -> Tensor:
    """Importance I_v of every visual token (AirCache eqs. 4 to 8), mean over each KV group.

    Three launches, whatever L and B are; no host sync; a request's result is the same, bit for bit,
    in every batch. With L layers, B requests:

    Args:
        q: [L, total_qo, H_q, D] instruction queries after RoPE; float32, float16 or bfloat16.
        qo_indptr: int32 [B + 1]; request b has rows qo_indptr[b]:qo_indptr[b + 1] of q.
        k_all: [L, rows, H_kv, D], the K pool: dtype of q, or float8_e4m3fn.
        text_indices: int32 or int64 [total_qo], the slots of the instruction tokens.
        kv_indptr: int32 [B + 1] over kv_indices.
        kv_indices: int32 or int64 [total_visual], each request's visual slots in token order.
        max_qo_len: the longest instruction, at most 512 (known on the host).
        max_kv_len: the most visual tokens of a request, at most 131072 (known on the host).
        sm_scale: softmax scale of the model.
        alpha: relevance threshold of eq. 5, in [0, 1].
        elite: "per-head", or "shared": every head takes the window of the head-mean row.
    Returns:
        float32 [L, H_kv, total_visual]. Requests without instruction get zeros.
    Raises:
        ValueError: a shape, dtype, device or value is not as above.
    """
    n_layers, _, n_kv, head_dim = check.pool_of(k_all)
    device = k_all.device
    check.tensor_of("q", q, (n_layers, "total_qo", "H_q", head_dim), check.FLOAT_DTYPES, device)
    check.last_dim_contiguous("q", q)
    check.matching_dtypes(q, k_all)
    total_qo, n_q = q.shape[1], q.shape[2]
    group = check.query_group("q", n_q, n_kv)
    check.tensor_of("qo_indptr", qo_indptr, ("B + 1",), torch.int32, device)
    check.contiguous("qo_indptr", qo_indptr)
    batch = check.int_in("batch size", qo_indptr.shape[0] - 1, 1)
    check.tensor_of("kv_indptr", kv_indptr, (batch + 1,), torch.int32, device)
    check.contiguous("kv_indptr", kv_indptr)
    check.index_vector("text_indices", text_indices, total_qo, device)
    check.index_vector("kv_indices", kv_indices, "total_visual", device)
    check.int_in("max_qo_len", max_qo_len, 1, check.MAX_INSTRUCTION)
    check.int_in("max_kv_len", max_kv_len, 1, check.MAX_VISUAL)
    check.finite("alpha", alpha, 0.0, 1.0)
    scale = check.finite("sm_scale", sm_scale)
    check.one_of("elite", elite, ELITE_MODES)
    total_visual = kv_indices.shape[0]
    out = torch.empty(n_layers, n_kv, total_visual, dtype=torch.float32, device=device)

    block_d = power_of_2(head_dim, 16)
    head_tiles = triton.cdiv(group, _BLOCK_H)
    block_r = 32
    block_n = min(64, 16384 // (block_d * q.element_size()))
    if INTERPRETED and max_kv_len >= 8192:
        block_n = 2048  # few large programs: they run one by one
    tiles = n_layers * n_kv * head_tiles
    splits = min(triton.cdiv(max_kv_len, _CHUNK), _MAX_SPLITS)
    dot = dot_dtype(q.dtype)
    total_rows = n_layers * n_q * total_qo
    mask = torch.empty(n_layers, n_q, total_qo, dtype=torch.int8, device=device)
    rows = torch.empty(total_rows, dtype=torch.int32, device=device)
    counts = torch.empty(n_layers, batch, n_q, dtype=torch.int32, device=device)
    lse = torch.empty(splits, total_rows, dtype=torch.float32, device=device)
    strides = (*q.stride()[:3], *k_all.stride()[:3])
    heads = {"H_Q": n_q, "GROUP": group, "HEAD_TILES": head_tiles, "HEAD_DIM": head_dim}
    blocks = {"BLOCK_H": _BLOCK_H, "BLOCK_D": block_d, "DOT": dot}

    shared = elite == "shared"
    _elite_fwd_kernel[(1 if shared else n_kv * head_tiles, batch, n_layers)](
        q, qo_indptr, k_all, text_indices, mask, rows, counts, *strides,
        total_qo, scale, float(alpha),
        H_KV=n_kv, BLOCK_T=check.MAX_INSTRUCTION, STEP_D=min(block_d, 64 // q.element_size()),
        SHARED=shared,
        # staged, the loop over tiles of "shared" would hold every step's keys in shared memory
        **heads, **blocks, num_warps=8, num_stages=1,
    )  # fmt: skip
    _lse_fwd_kernel[(splits, batch, tiles)](
        q, qo_indptr, k_all, text_indices, kv_indptr, kv_indices, mask, rows, counts, lse,
        *strides, total_qo, total_rows, scale,
        BLOCK_R=block_r, BLOCK_N=block_n, CHUNK=_CHUNK, BLOCK_S=_MAX_SPLITS,
        **heads, **blocks, num_warps=4, num_stages=2,
    )  # fmt: skip
    _importance_fwd_kernel[(triton.cdiv(max_kv_len, block_n), batch, n_layers * n_kv)](
        q, qo_indptr, k_all, kv_indptr, kv_indices, rows, counts, lse, out,
        *strides, total_qo, total_rows, total_visual, splits, scale,
        BLOCK_R=block_r, BLOCK_N=block_n, BLOCK_S=_MAX_SPLITS,
        **heads, **blocks, num_warps=4,
    )  # fmt: skip
    return out
