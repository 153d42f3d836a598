# SPDX-License-Identifier: Apache-2.0
"""FlashInfer page tables against the oracle's absolute rows."""

from __future__ import annotations

import pytest
import torch

from aircache_kernels import build_flashinfer_tables, reference
from tests.unit.kernels.cases import Request, decode_case, poisoned


def test_page_tables(device: torch.device) -> None:
    requests = [
        Request(37),
        Request(5000, 9, 4900, (1, 4899, 500)),
        Request(64, 0, 40, (0, 40, 20)),
        Request(1),
    ]
    case = decode_case(requests, n_kv=1, n_q=1, head_dim=16, padded=2, device=device)
    batch, rows = case.q.shape[0], case.k_all.shape[1]
    kv_indptr = poisoned((3, batch + 1), torch.int32, device)
    kv_indices = poisoned((3, 6000), torch.int32, device)
    last_page_len = poisoned((batch,), torch.int32, device)
    build_flashinfer_tables(
        *case.requests(),
        rows=rows,
        kv_indptr=kv_indptr,
        kv_indices=kv_indices,
        last_page_len=last_page_len,
    )
    assert (last_page_len == 1).all()
    for layer in range(3):
        want = reference.physical_rows_reference(3, rows, layer, *case.requests())
        bounds = kv_indptr[layer].tolist()
        assert bounds[0] == 0
        for b, expected in enumerate(want):
            assert torch.equal(kv_indices[layer, bounds[b] : bounds[b + 1]].long(), expected)
        assert (kv_indices[layer, bounds[-1] :] == -123456789).all()


def test_capacity_is_not_passed(device: torch.device) -> None:
    case = decode_case([Request(30)], n_layers=2, device=device)
    room = poisoned((2, 30), torch.int32, device)
    build_flashinfer_tables(
        *case.requests(),
        rows=case.k_all.shape[1],
        kv_indptr=poisoned((2, 2), torch.int32, device),
        kv_indices=room.view(-1)[:40].view(2, 20),
        last_page_len=poisoned((1,), torch.int32, device),
    )
    assert (room.view(-1)[40:] == -123456789).all()


def test_too_many_rows_are_refused(device: torch.device) -> None:
    case = decode_case([Request(3)], n_layers=2, device=device)
    with pytest.raises(ValueError, match=r"L \* rows < 2\*\*31, got 2 \* 1073741824"):
        build_flashinfer_tables(
            *case.requests(),
            rows=2**30,
            kv_indptr=poisoned((2, 2), torch.int32, device),
            kv_indices=poisoned((2, 20), torch.int32, device),
            last_page_len=poisoned((1,), torch.int32, device),
        )
