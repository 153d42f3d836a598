# SPDX-License-Identifier: Apache-2.0
"""The FlashInfer decoder against the Triton one, with a stand-in for FlashInfer's wrapper."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from aircache_kernels import OnePlanDecode
from aircache_sglang.runtime import flashinfer_decode
from aircache_sglang.runtime.flashinfer_decode import FlashInferDecoder, most_keys
from aircache_sglang.runtime.kernel_decode import KernelDecoder
from aircache_sglang.runtime.kernel_pass import KernelPass
from tests.unit.kernels.test_engine_twins import H_KV, H_Q, MIXED, PROMPTS, SAME, D, L, Side, build


class Wrapper:
    """FlashInfer's BatchDecodeWithPagedKVCacheWrapper, as far as its documentation goes.

    flashinfer 0.7.2, decode.py: request i reads the pages indices[indptr[i] : indptr[i + 1]], all
    full but the last, which holds last_page_len[i] tokens. Backend and head counts as planned; the
    work is split by the lengths of the plan, which no later table may exceed.
    """

    plans: list[list[int]]

    def __init__(self, workspace: torch.Tensor, layout: str, **options: Any) -> None:
        assert workspace.dtype == torch.uint8 and layout == "NHD"
        self._use_tensor_cores, self._backend = options["use_tensor_cores"], options["backend"]
        self.plans = []

    def plan(
        self, indptr: Any, indices: Any, last_page_len: Any, n_q: int, n_kv: int, head_dim: int,
        page_size: int, *, q_data_type: Any, kv_data_type: Any, sm_scale: float,
    ) -> None:  # fmt: skip
        assert (n_q, n_kv, head_dim, page_size) == (H_Q, H_KV, D, 1)
        assert q_data_type == kv_data_type == torch.float32
        self._paged_kv_indptr_buf, self._paged_kv_indices_buf = indptr, indices
        self._paged_kv_last_page_len_buf = last_page_len
        self._scale = sm_scale
        assert (last_page_len == 1).all()
        self.plans.append(indptr.diff().tolist())

    def run(self, q: torch.Tensor, pages: Any) -> torch.Tensor:
        assert q.is_contiguous()
        k, v = pages  # [pages, page size, H_kv, D]
        assert k.shape[1] == 1
        bounds = self._paged_kv_indptr_buf.tolist()
        results = []
        for i, planned in enumerate(self.plans[-1]):
            table = self._paged_kv_indices_buf[bounds[i] : bounds[i + 1]].long()
            assert len(table) - 1 + int(self._paged_kv_last_page_len_buf[i]) == len(table)
            assert 0 < len(table) <= planned, "more keys than were planned"
            keys, values = (cache[table, 0].transpose(0, 1)[None] for cache in (k, v))
            one = q[i].view(1, H_Q, 1, D)
            results.append(
                scaled_dot_product_attention(
                    one, keys, values, scale=self._scale, enable_gqa=True
                ).view(H_Q, D)
            )
        return torch.stack(results)


@pytest.fixture(autouse=True)
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(flashinfer_decode, "WORKSPACE_BYTES", 1)


def decoder_of(side: Side) -> FlashInferDecoder:
    return FlashInferDecoder(
        side.pool,
        side.inputs.table,
        n_q=H_Q,
        q_dtype=torch.float32,
        scale=D**-0.5,
    )


def test_it_agrees_with_the_kernel_step_by_step() -> None:
    """Steps of growing batches: one plan a step, every layer at its own lengths."""
    side = build(list(MIXED))
    KernelPass(side.inputs)(side.jobs)
    records = {job.record.row: job.record for job in side.jobs}
    ours = decoder_of(side)
    kernel = KernelDecoder(side.pool, side.inputs.table)
    lengths = {row: prompt.length + 1 for row, prompt in enumerate(PROMPTS, start=1)} | {4: 49}
    g = torch.Generator().manual_seed(1)
    for step, rows in enumerate(([3], [3, 4, 1, 2], [4], [2, 1])):
        seq_lens = torch.tensor([lengths[row] for row in rows])
        batch = SimpleNamespace(
            req_pool_indices=torch.tensor(rows), seq_lens=seq_lens, seq_lens_cpu=seq_lens
        )
        ours.plan(batch, [records.get(row) for row in rows])
        assert len(ours._decode._wrapper.plans) == step + 1
        # as a slice of a fused projection
        q = torch.randn(len(rows), H_Q, 2 * D, generator=g)[..., :D]
        for number in range(L):
            layer = SimpleNamespace(layer_id=number, scaling=D**-0.5)
            torch.testing.assert_close(
                ours.attend(q, layer, batch), kernel.attend(q, layer, batch), rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("retention", [0.01, 0.2, 0.5])
def test_bounds_hold_whatever_the_split_over_layers(retention: float) -> None:
    """One layer may hold all cells of a request, but no more than its visual tokens."""
    side = build([dataclasses.replace(SAME, retention=retention)] * 3)
    records = [job.record for job in side.jobs]
    seq_lens = torch.tensor([prompt.length for prompt in PROMPTS])
    most = most_keys(seq_lens, records, L)
    assert most.dtype == torch.int32
    for bound, record, length in zip(most.tolist(), records, seq_lens.tolist(), strict=True):
        n_visual, m = record.intent.prompt.n_visual, record.intent.columns
        # The rest of the L * m cells has to fit in the other layers.
        largest = min(n_visual, L * m - (L - 1))
        assert length - n_visual + largest <= bound <= length
    assert most_keys(seq_lens, [None] * 3, L).tolist() == seq_lens.tolist()


@pytest.mark.parametrize("attribute", ["_use_tensor_cores", "_backend"])
def test_another_kernel_of_flashinfer_is_refused(attribute: str) -> None:
    decode = OnePlanDecode(
        torch.empty(1, dtype=torch.uint8), n_layers=L, rows=9, n_q=H_Q, n_kv=H_KV, head_dim=D,
        q_dtype=torch.float32, kv_dtype=torch.float32, sm_scale=1.0,
    )  # fmt: skip
    setattr(decode._wrapper, attribute, None)
    one = torch.ones(1, dtype=torch.int32)
    tables = (torch.zeros(L, 2, dtype=torch.int32), torch.zeros(L, 1, dtype=torch.int32), one)
    with pytest.raises(RuntimeError, match="safe on fa2 tensor cores only"):
        decode.plan(one, *tables)
