# SPDX-License-Identifier: Apache-2.0
"""Two-stream decode attention against its oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aircache_kernels import DecodeConfig, build_text_csr, decode_attention, reference
from aircache_kernels.validation import FP8_DTYPE, HEAD_DIMS
from tests.unit.kernels.cases import DecodeCase, Request, decode_case, poisoned

MIXED = [
    Request(37),
    Request(120, 9, 90, (1, 59, 30)),
    Request(64, 0, 40, (0, 40, 20)),  # no text before the gap, one layer without cells
    Request(1),
]


def text_csr(case: DecodeCase) -> tuple[Tensor, Tensor]:
    batch = case.q.shape[0]
    return build_text_csr(
        *case.tables(),
        text_indptr=poisoned((batch + 1,), torch.int32, case.q.device),
        text_indices=poisoned((int(case.seq_lens.sum()),), torch.int32, case.q.device),
    )


def hold(case: DecodeCase, *, csr: bool = True, splits: int | None = 3, **options: float) -> None:
    """Output and LSE of every layer; the error against float64 is held to that of eager code."""
    text_indptr, text_indices = text_csr(case) if csr else (None, None)
    for layer in range(case.k_all.shape[0]):
        out = poisoned(case.q.shape, case.q.dtype, case.q.device)
        lse = poisoned(case.q.shape[:2], torch.float32, case.q.device)
        decode_attention(
            *case.inputs(layer),
            sm_scale=case.q.shape[2] ** -0.5,
            out=out,
            lse=lse,
            text_indptr=text_indptr,
            text_indices=text_indices,
            num_kv_splits=splits,
            config=DecodeConfig(16, 4, 2),
            **options,
        )
        oracle = {"sm_scale": case.q.shape[2] ** -0.5, **options}
        truth, true_lse = reference.decode_attention_reference(*case.inputs(layer), **oracle)
        eager, eager_lse = reference.decode_attention_reference(
            *case.inputs(layer), **oracle, dtype=case.q.dtype
        )
        # the store in the output type, and float32 rounding inside
        rounding = torch.finfo(case.q.dtype).eps + 16 * torch.finfo(torch.float32).eps
        for got, low, exact, floor in (
            (out, eager, truth, rounding * truth.abs().max()),
            (lse, eager_lse, true_lse, 3e-6 * true_lse.abs().max()),
        ):
            allowed = 2 * (low.double() - exact).abs().max() + floor
            assert (got.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim: int, device: torch.device) -> None:
    hold(decode_case(MIXED, head_dim=head_dim, device=device))


@pytest.mark.parametrize(("n_q", "n_kv"), [(1, 1), (3, 3), (14, 2), (17, 1), (71, 1)])
def test_groups(n_q: int, n_kv: int, device: torch.device) -> None:
    hold(decode_case(MIXED[1:3], n_q=n_q, n_kv=n_kv, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fp8", [False, True])
def test_dtypes(dtype: torch.dtype, fp8: bool, device: torch.device) -> None:
    case = decode_case(MIXED, dtype=dtype, kv_dtype=FP8_DTYPE if fp8 else None, device=device)
    hold(case, **({"k_scale": 0.6, "v_scale": 1.7} if fp8 else {}))


@pytest.mark.parametrize("splits", [1, 2, 7, 64, None])
@pytest.mark.parametrize("csr", [True, False])
def test_splits(splits: int | None, csr: bool, device: torch.device) -> None:
    hold(decode_case(MIXED, device=device), csr=csr, splits=splits)


def test_logit_cap(device: torch.device) -> None:
    case = decode_case(MIXED, device=device)
    case.q *= 20.0
    hold(case, logit_cap=5.0)


def test_padded_rows_are_harmless(device: torch.device) -> None:
    hold(decode_case(MIXED, padded=3, device=device))


def test_table_of_a_full_request_gives_the_uncompressed_result(device: torch.device) -> None:
    """Retention 1 with each token in its own plane is plain attention, at uneven lengths."""
    n_layers, n_visual = 2, 11
    case = decode_case([Request(20)], n_layers=n_layers, device=device)
    plain = [torch.empty_like(case.q) for _ in range(n_layers)]
    for layer in range(n_layers):
        decode_attention(*case.inputs(layer), sm_scale=0.2, out=plain[layer])
    index = int(case.req_pool_indices[0])
    start = 4
    span = case.req_to_token[index, start : start + n_visual].long()
    k_old, v_old = case.k_all.clone(), case.v_all.clone()
    for cell in range(n_layers * n_visual):
        layer, token = divmod(cell, n_visual)
        column, plane = divmod(cell, n_layers)
        case.k_all[plane, span[column]] = k_old[layer, span[token]]
        case.v_all[plane, span[column]] = v_old[layer, span[token]]
    case.gap_start[index], case.gap_len[index] = start, n_visual
    case.cell_offset[index] = torch.tensor([0, n_visual, 2 * n_visual])
    for layer in range(n_layers):
        got = decode_attention(*case.inputs(layer), sm_scale=0.2)
        torch.testing.assert_close(got, plain[layer], rtol=1e-5, atol=1e-6)


def test_text_csr(device: torch.device) -> None:
    case = decode_case([*MIXED, Request(2500)], padded=2, device=device)
    indptr, indices = text_csr(case)
    want_indptr, want = reference.text_csr_reference(*case.tables())
    assert torch.equal(indptr, want_indptr)
    assert torch.equal(indices[: want.shape[0]], want)
    assert (indices[want.shape[0] :] == -123456789).all()


def test_text_csr_stops_at_its_capacity(device: torch.device) -> None:
    case = decode_case(MIXED, device=device)
    _, want = reference.text_csr_reference(*case.tables())
    room = poisoned((50,), torch.int32, device)
    indptr = torch.empty(case.q.shape[0] + 1, dtype=torch.int32, device=device)
    build_text_csr(*case.tables(), text_indptr=indptr, text_indices=room[:40])
    assert torch.equal(room[:40], want[:40])
    assert (room[40:] == -123456789).all()


def test_strided_output_and_int32_lengths(device: torch.device) -> None:
    case = decode_case(MIXED, device=device)
    case.seq_lens, case.req_pool_indices = case.seq_lens.int(), case.req_pool_indices.int()
    wide = poisoned((4, 4, 2, 32), torch.float32, device)
    decode_attention(*case.inputs(1), sm_scale=0.2, out=wide[:, :, 0])
    truth, _ = reference.decode_attention_reference(*case.inputs(1), sm_scale=0.2)
    torch.testing.assert_close(wide[:, :, 0].double(), truth, rtol=1e-5, atol=1e-6)
    assert wide[:, :, 1].isnan().all()


def test_bad_arguments(device: torch.device) -> None:
    case = decode_case(MIXED, device=device)
    with pytest.raises(ValueError, match=r"layer must be an integer in \[0, 2\], got 3"):
        decode_attention(*case.inputs(3), sm_scale=1.0)
    with pytest.raises(ValueError, match=r"lse must have shape \[4, 4\], got \[4\]"):
        decode_attention(*case.inputs(0), sm_scale=1.0, lse=torch.empty(4, device=device))
    with pytest.raises(ValueError, match="logit_cap must be a finite"):
        decode_attention(*case.inputs(0), sm_scale=1.0, logit_cap=-1.0)
    with pytest.raises(ValueError, match=r"num_kv_splits must be an integer in \[1, 64\], got 65"):
        decode_attention(*case.inputs(0), sm_scale=1.0, num_kv_splits=65)
    with pytest.raises(ValueError, match="given together"):
        decode_attention(*case.inputs(0), sm_scale=1.0, text_indptr=case.gap_len)
    case.seq_lens = case.seq_lens[:2]
    with pytest.raises(ValueError, match=r"seq_lens must have shape \[4\], got \[2\]"):
        decode_attention(*case.inputs(0), sm_scale=1.0)
