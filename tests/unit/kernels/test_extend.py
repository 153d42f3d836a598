# SPDX-License-Identifier: Apache-2.0
"""Two-stream extend attention against its oracle."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from aircache_kernels import extend_attention, reference
from aircache_kernels.validation import FP8_DTYPE, HEAD_DIMS
from tests.unit.kernels.cases import DecodeCase, Request, decode_case, prefix

MIXED = [
    Request(37),
    Request(120, 9, 90, (1, 59, 30)),
    Request(64, 0, 40, (0, 40, 20)),  # no text before the gap, one layer without cells
    Request(5),
]
NEW = [11, 7, 24, 5]  # the last: the whole request


def queries(case: DecodeCase, new: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """q [total_qo, H_q, D] and qo_indptr for so many new tokens of each request."""
    shape = (sum(new), *case.q.shape[1:])
    q = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return q.to(case.q), prefix(new, case.q.device)


def random_trees(batch: int, n: int, device: torch.device, *, seed: int = 0) -> Tensor:
    """bool [batch, n, n]: each node follows one before it, the first none; n of 1 is a chain."""
    generator = torch.Generator().manual_seed(seed)
    trees = torch.eye(n, dtype=torch.bool).repeat(batch, 1, 1)
    for b in range(batch):
        for node in range(1, n):
            parent = int(torch.randint(0, node, (), generator=generator))
            trees[b, node] |= trees[b, parent]
    return trees.to(device)


def hold(case: DecodeCase, new: Sequence[int], tree: Tensor | None = None) -> None:
    """Every layer's output; the error against float64 is held to that of eager code."""
    q, qo_indptr = queries(case, new)
    scale = q.shape[2] ** -0.5
    for layer in range(case.k_all.shape[0]):
        _, *inputs = case.inputs(layer)
        out = extend_attention(
            q,
            qo_indptr,
            *inputs,
            max_qo_len=max(new),
            sm_scale=scale,
            tree=tree,
        )
        truth = reference.extend_attention_reference(
            q, qo_indptr, *inputs, sm_scale=scale, tree=tree
        )
        eager = reference.extend_attention_reference(
            q, qo_indptr, *inputs, sm_scale=scale, tree=tree, dtype=q.dtype
        )
        # the store in the output type, and float32 rounding inside
        rounding = torch.finfo(q.dtype).eps + 16 * torch.finfo(torch.float32).eps
        allowed = 2 * (eager.double() - truth).abs().max() + rounding * truth.abs().max()
        assert (out.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim: int, device: torch.device) -> None:
    hold(decode_case(MIXED, head_dim=head_dim, device=device), NEW)


@pytest.mark.parametrize(("n_q", "n_kv"), [(1, 1), (3, 3), (14, 2), (71, 1)])
def test_groups(n_q: int, n_kv: int, device: torch.device) -> None:
    hold(decode_case(MIXED[1:3], n_q=n_q, n_kv=n_kv, device=device), NEW[1:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fp8", [False, True])
def test_dtypes(dtype: torch.dtype, fp8: bool, device: torch.device) -> None:
    case = decode_case(MIXED, dtype=dtype, kv_dtype=FP8_DTYPE if fp8 else None, device=device)
    hold(case, NEW)


@pytest.mark.parametrize("new", [[1, 1, 1, 1], [0, 30, 0, 1], [37, 1, 24, 2]])
def test_lengths(new: list[int], device: torch.device) -> None:
    """Down to one token, none at all, or all of an uncompressed request."""
    hold(decode_case(MIXED, device=device), new)


@pytest.mark.parametrize("n", [1, 2, 5, 13, 21])
@pytest.mark.parametrize(("n_q", "n_kv"), [(4, 2), (14, 2)])
def test_trees(n: int, n_q: int, n_kv: int, device: torch.device) -> None:
    """Of one node up to more rows than a tile has."""
    case = decode_case(MIXED[:3], n_q=n_q, n_kv=n_kv, device=device)
    hold(case, [n] * 3, random_trees(3, n, device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fp8", [False, True])
def test_types_of_trees(dtype: torch.dtype, fp8: bool, device: torch.device) -> None:
    kv_dtype = FP8_DTYPE if fp8 else None
    case = decode_case(MIXED[:3], dtype=dtype, kv_dtype=kv_dtype, device=device)
    hold(case, [7] * 3, random_trees(3, 7, device))


def test_a_tree_that_is_a_whole_request(device: torch.device) -> None:
    """No text before it, so that its own first node is all that some see besides themselves."""
    case = decode_case(MIXED[3:], device=device)
    hold(case, [5], random_trees(1, 5, device))


def test_a_chain_is_causal(device: torch.device) -> None:
    case = decode_case(MIXED[:3], device=device)
    q, qo_indptr = queries(case, [7] * 3)
    _, *inputs = case.inputs(1)
    options = {"max_qo_len": 7, "sm_scale": 0.2}
    chain = torch.ones(3, 7, 7, dtype=torch.bool, device=device).tril()
    causal = extend_attention(q, qo_indptr, *inputs, **options)
    of_chain = extend_attention(q, qo_indptr, *inputs, **options, tree=chain)
    torch.testing.assert_close(of_chain, causal, rtol=0.0, atol=1e-5)


def test_a_branch_changes_nothing_beside_it(device: torch.device) -> None:
    """A node's KV is read by those that follow it, and by nobody else."""
    case = decode_case(MIXED[1:2], device=device)
    q, qo_indptr = queries(case, [6])
    _, *inputs = case.inputs(1)
    tree = torch.eye(6, dtype=torch.bool, device=device)[None].contiguous()
    tree[:, :, 0] = True
    tree[0, 4, 2] = True  # 0 has children 1, 2, 3 and 5, and 2 has the child 4
    options = {"max_qo_len": 6, "sm_scale": 0.2, "tree": tree}
    before = extend_attention(q, qo_indptr, *inputs, **options)
    row, length = int(case.req_pool_indices[0]), int(case.seq_lens[0])
    slot = int(case.req_to_token[row, length - 6 + 2])
    case.k_all[1, slot] += 1.0
    case.v_all[1, slot] += 1.0
    after = extend_attention(q, qo_indptr, *inputs, **options)
    same = [torch.equal(before[node], after[node]) for node in range(6)]
    assert same == [True, True, False, True, False, True]


def test_a_later_token_changes_nothing_before_it(device: torch.device) -> None:
    case = decode_case(MIXED[1:2], device=device)
    q, qo_indptr = queries(case, [7])
    _, *inputs = case.inputs(1)
    before = extend_attention(q, qo_indptr, *inputs, max_qo_len=7, sm_scale=0.2)
    row, length = int(case.req_pool_indices[0]), int(case.seq_lens[0])
    slot = int(case.req_to_token[row, length - 1])
    case.k_all[1, slot] += 1.0
    case.v_all[1, slot] += 1.0
    after = extend_attention(q, qo_indptr, *inputs, max_qo_len=7, sm_scale=0.2)
    assert torch.equal(before[:-1], after[:-1])
    assert not torch.isclose(before[-1], after[-1]).any(dim=-1).all()


@pytest.mark.parametrize("alone", range(4))
def test_no_other_request_changes_a_result(alone: int, device: torch.device) -> None:
    """Bit for bit: the tiles of a request follow from its own lengths."""
    case = decode_case(MIXED, device=device)
    q, qo_indptr = queries(case, NEW)
    _, k_all, v_all, layer, tables, rows, lens = case.inputs(1)
    together = extend_attention(
        q, qo_indptr, k_all, v_all, layer, tables, rows, lens, max_qo_len=max(NEW), sm_scale=0.2
    )
    first, last = qo_indptr.tolist()[alone : alone + 2]
    mine = slice(alone, alone + 1)
    got = extend_attention(
        *(q[first:last], prefix([last - first], device), k_all, v_all, layer, tables),
        *(rows[mine].clone(), lens[mine].clone()),
        max_qo_len=last - first,
        sm_scale=0.2,
    )
    assert torch.equal(got, together[first:last])


def test_bad_arguments(device: torch.device) -> None:
    case = decode_case(MIXED, device=device)
    q, qo_indptr = queries(case, NEW)
    _, *inputs = case.inputs(0)
    options = {"max_qo_len": 24, "sm_scale": 1.0}
    with pytest.raises(ValueError, match=r"qo_indptr must have shape \[5\], got \[4\]"):
        extend_attention(q, qo_indptr[:4], *inputs, **options)
    with pytest.raises(ValueError, match="max_qo_len must be an integer >= 1, got 0"):
        extend_attention(q, qo_indptr, *inputs, **{**options, "max_qo_len": 0})
    with pytest.raises(ValueError, match=r"tree must have shape \[4, 24, 24\], got \[4, 24, 23\]"):
        short = torch.ones(4, 24, 23, dtype=torch.bool, device=device)
        extend_attention(q, qo_indptr, *inputs, **options, tree=short)
    with pytest.raises(ValueError, match=r"q must have shape \[total_qo, H_q, 32\]"):
        extend_attention(q[..., :16], qo_indptr, *inputs, **options)
