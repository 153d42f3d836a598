# SPDX-License-Identifier: Apache-2.0
"""Two-stream decode attention against its oracle, and what a batch may change in it: nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from aircache_kernels import Tables, decode, decode_attention, reference
from aircache_kernels.decode import MOST_TILES, TILE, most_tiles
from aircache_kernels.validation import FP8_DTYPE, HEAD_DIMS
from tests.unit.kernels.cases import DecodeCase, Request, decode_case

MIXED = [
    Request(37),
    Request(120, 9, 90, (1, 59, 30)),
    Request(64, 0, 40, (0, 40, 20)),  # no text before the gap, one layer without cells
    Request(1),
]


@pytest.fixture
def short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of some dozen keys have several tiles."""
    monkeypatch.setattr(decode, "TILE", 16)


def hold(case: DecodeCase) -> None:
    """Every layer's output; the error against float64 is held to that of eager code."""
    scale = case.q.shape[2] ** -0.5
    for layer in range(case.k_all.shape[0]):
        got = decode_attention(*case.inputs(layer), sm_scale=scale)
        truth = reference.decode_attention_reference(*case.inputs(layer), sm_scale=scale)
        eager = reference.decode_attention_reference(
            *case.inputs(layer), sm_scale=scale, dtype=case.q.dtype
        )
        # the store in the output type, and float32 rounding inside
        rounding = torch.finfo(case.q.dtype).eps + 16 * torch.finfo(torch.float32).eps
        allowed = 2 * (eager.double() - truth).abs().max() + rounding * truth.abs().max()
        assert (got.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim: int, device: torch.device) -> None:
    hold(decode_case(MIXED, head_dim=head_dim, device=device))


@pytest.mark.parametrize(("n_q", "n_kv"), [(1, 1), (3, 3), (14, 2), (17, 1), (71, 1)])
def test_groups(n_q: int, n_kv: int, short_tiles: None, device: torch.device) -> None:
    hold(decode_case(MIXED[1:3], n_q=n_q, n_kv=n_kv, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fp8", [False, True])
def test_dtypes(dtype: torch.dtype, fp8: bool, short_tiles: None, device: torch.device) -> None:
    hold(decode_case(MIXED, dtype=dtype, kv_dtype=FP8_DTYPE if fp8 else None, device=device))


@pytest.mark.parametrize(
    ("tile", "most"), [(16, MOST_TILES), (16, 3), (48, 2), (16, 1), (TILE, 64)]
)
def test_tiles(tile: int, most: int, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """A request of one tile, of many, and of longer ones since it may not have so many."""
    monkeypatch.setattr(decode, "TILE", tile)
    monkeypatch.setattr(decode, "MOST_TILES", most)
    monkeypatch.setattr(decode, "_FEWEST", 1)
    hold(decode_case([*MIXED, Request(200)], device=device))


def test_padded_rows_are_harmless(short_tiles: None, device: torch.device) -> None:
    hold(decode_case(MIXED, padded=3, device=device))


def test_more_requests_than_programs(
    short_tiles: None, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Each program takes several tiles, of several requests."""
    monkeypatch.setattr(decode, "_PROGRAMS", 1)
    monkeypatch.setattr(decode, "multiprocessors", lambda device: 3)
    hold(decode_case([*MIXED, *MIXED, Request(33)], n_layers=3, device=device))


def alone(case: DecodeCase, place: int) -> DecodeCase:
    """The same pool and tables, and a batch of one of the requests."""
    mine = slice(place, place + 1)
    return DecodeCase(
        case.q[mine].clone(),
        case.k_all,
        case.v_all,
        case.req_to_token,
        case.req_pool_indices[mine].clone(),
        case.seq_lens[mine].clone(),
        case.gap_start,
        case.gap_len,
        case.cell_offset,
    )


@settings(max_examples=4, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(st.data())
def test_no_other_request_changes_a_result(data: st.DataObject) -> None:
    """Bit for bit, in batches of any size where `batch_invariant`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    others = data.draw(st.lists(st.integers(1, 200), max_size=17))
    requests = [*MIXED[:3], Request(150), *(Request(n) for n in others)]
    case = decode_case(requests, n_q=2, n_kv=1, head_dim=16, device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "TILE", data.draw(st.sampled_from([16, 32])))
        patch.setattr(decode, "_PARTS", 16)  # so that the batch would decide
        patch.setattr(decode, "_ROWS", data.draw(st.sampled_from([3, 256])))
        layer = data.draw(st.integers(0, 2))
        together = decode_attention(*case.inputs(layer), sm_scale=0.2, batch_invariant=True)
        for place in range(4):
            got = decode_attention(
                *alone(case, place).inputs(layer), sm_scale=0.2, batch_invariant=True
            )
            assert torch.equal(got[0], together[place])
        free = decode_attention(*case.inputs(layer), sm_scale=0.2)
        torch.testing.assert_close(free, together, rtol=1e-5, atol=1e-6)


def test_scratch_is_bounded() -> None:
    for batch in (1, 64, 65, 300, 4096):
        most = most_tiles(batch, batch_invariant=False)
        assert decode._FEWEST <= most <= MOST_TILES
        assert batch * most <= max(decode._PARTS, decode._FEWEST * batch)
        assert most_tiles(batch, batch_invariant=True) == MOST_TILES


@given(st.integers(1, 1 << 20), st.integers(1, MOST_TILES))
def test_a_program_walks_its_share_and_a_tile_more(n: int, most: int) -> None:
    """As `_cut`: tiles of one length that cover all keys, as many as allowed at most."""
    length = -(-n // (TILE * most)) * TILE
    tiles = -(-n // length)
    assert tiles <= most and (tiles - 1) * length < n <= tiles * length
    # One long request does not make its tiles longer than they must be.
    assert length <= max(TILE, 2 * n / most)


def test_table_of_a_full_request_gives_the_uncompressed_result(device: torch.device) -> None:
    """Retention 1 with each token in its own plane is plain attention, at uneven lengths."""
    n_layers, n_visual = 2, 11
    case = decode_case([Request(20)], n_layers=n_layers, device=device)
    plain = [decode_attention(*case.inputs(layer), sm_scale=0.2) for layer in range(n_layers)]
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


def test_int32_lengths_and_strided_queries(device: torch.device) -> None:
    case = decode_case(MIXED, device=device)
    case.seq_lens, case.req_pool_indices = case.seq_lens.int(), case.req_pool_indices.int()
    case.q = torch.stack([case.q, case.q + 1.0], dim=2)[:, :, 0]
    assert not case.q.is_contiguous()
    got = decode_attention(*case.inputs(1), sm_scale=0.2)
    truth = reference.decode_attention_reference(*case.inputs(1), sm_scale=0.2)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-6)


def test_bad_arguments(device: torch.device) -> None:
    case = decode_case(MIXED, device=device)
    with pytest.raises(ValueError, match=r"layer must be an integer in \[0, 2\], got 3"):
        decode_attention(*case.inputs(3), sm_scale=1.0)
    with pytest.raises(ValueError, match="sm_scale must be a finite"):
        decode_attention(*case.inputs(0), sm_scale=float("nan"))
    q, k_all, v_all, layer, tables, rows, lens = case.inputs(0)
    short = Tables(*tables)._replace(gap_start=tables.gap_start[:2])
    with pytest.raises(ValueError, match=r"gap_start must have shape \[6\], got \[2\]"):
        decode_attention(q, k_all, v_all, layer, short, rows, lens, sm_scale=1.0)
    with pytest.raises(ValueError, match=r"seq_lens must have shape \[4\], got \[2\]"):
        decode_attention(q, k_all, v_all, layer, tables, rows, lens[:2], sm_scale=1.0)
