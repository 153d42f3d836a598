# SPDX-License-Identifier: Apache-2.0
"""The compressing backend around a stock class that, like FlashInfer's, captures wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.runner_utils.capture_mode import (
    _set_capture_attention_variant,
    get_capture_attention_variant,
)

from aircache_sglang.engine.backend import (
    COMPRESSED,
    PLAIN,
    AttentionState,
    DecodeGraphVariants,
    Work,
    adopt,
)
from aircache_sglang.engine.compressor import Compressor
from aircache_sglang.runtime.extend import ExtendJob
from aircache_sglang.runtime.table import CompressionTable

RECORD: Any = object()


class Stock(AttentionBackend):
    """One wrapper a capture, planned by every call, as flashinfer_backend.py has it."""

    def __init__(self) -> None:
        self.captured: dict[int, object] = {}
        self.plans: list[object] = []
        self.decoded = 0

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        if in_capture:
            self.captured[forward_batch.batch_size] = object()
        self.plans.append(self.captured.get(forward_batch.batch_size))

    def forward(self, q: Any, *args: Any, **kwargs: Any) -> Any:
        self.decoded += 1
        return q

    def can_run_prefill_cuda_graph(self, forward_batch: Any) -> bool:
        return forward_batch.small


class Decoder:
    def __init__(self) -> None:
        self.planned: list[Any] = []

    def plan(self, forward_batch: Any, records: Any) -> None:
        self.planned.append(records)

    def attend(self, q: torch.Tensor, layer: Any, forward_batch: Any) -> torch.Tensor:
        return q + 1.0


@pytest.fixture(autouse=True)
def no_capture() -> Iterator[None]:
    yield
    _set_capture_attention_variant(None)


@pytest.fixture
def state() -> AttentionState:
    pool: Any = SimpleNamespace(plane=lambda layer: layer.layer_id, write=lambda *args: None)
    extender: Any = SimpleNamespace()
    return AttentionState(pool, Decoder(), extender, get_capture_attention_variant)


@pytest.fixture
def backend(state: AttentionState) -> Any:
    stock = Stock()
    adopt(stock, state)
    return stock


def batch(mode: ForwardMode = ForwardMode.DECODE, size: int = 4) -> Any:
    return SimpleNamespace(batch_size=size, forward_mode=mode, out_cache_loc=None, small=True)


LAYER = SimpleNamespace(layer_id=0, tp_q_head_num=2, qk_head_dim=3, v_head_dim=3)


def forward(backend: Any) -> float:
    """0 from the stock decode, 1 from ours."""
    q = torch.zeros(4, 6)
    return float(backend.forward(q, None, None, LAYER, batch()).mean())


def capture(backend: Any) -> None:
    """As decode_cuda_graph_runner.py, _capture_one_stream, does for one batch size."""
    for label in DecodeGraphVariants(backend.aircache).capture_labels:
        _set_capture_attention_variant(label)
        backend.init_forward_metadata_out_graph(batch(), in_capture=True)
        assert forward(backend) == (label == COMPRESSED)
    _set_capture_attention_variant(None)


@pytest.mark.parametrize("labels", [(PLAIN, COMPRESSED), (COMPRESSED, PLAIN)])
def test_the_stock_graph_keeps_its_wrapper(
    labels: tuple[str, ...], backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In either order: our capture makes no wrapper, so none is freed under the stock graph."""
    monkeypatch.setattr(DecodeGraphVariants, "capture_labels", labels)
    capture(backend)
    assert len(backend.plans) == 1 and backend.plans[0] is backend.captured[4]


def test_every_variant_is_captured() -> None:
    assert sorted(DecodeGraphVariants.capture_labels) == sorted((PLAIN, COMPRESSED))


def test_a_replay_plans_what_its_graph_reads(backend: Any, state: AttentionState) -> None:
    """The stock plan for a stock graph alone; each batch gets the variant of its records."""
    capture(backend)
    variants = DecodeGraphVariants(state)
    for records, label, plans in (((), PLAIN, 2), ([None, RECORD], COMPRESSED, 2), ((), PLAIN, 3)):
        with state.during(Work(records=records)):
            assert variants.select(batch()) == label
            backend.init_forward_metadata_out_graph(batch())
        assert len(backend.plans) == plans
    assert set(backend.plans) == {backend.captured[4]}


def test_the_captured_label_outweighs_the_records(state: AttentionState) -> None:
    """Capture runs between requests or before any; what it records follows its label."""
    for label, records, expected in (
        (None, (), False),
        (None, [RECORD], True),
        (PLAIN, [RECORD], False),
        (COMPRESSED, (), True),
    ):
        _set_capture_attention_variant(label)
        with state.during(Work(records=records)):
            assert state.decodes() == expected


def test_batches_that_must_not_matter(backend: Any) -> None:
    """All decode is ours then, eager and in graphs, with nothing compressed too."""
    state = backend.aircache
    state.batch_invariant = True
    assert DecodeGraphVariants(state).select(batch()) == COMPRESSED
    backend.init_forward_metadata(batch())
    assert (len(backend.plans), forward(backend), backend.decoded) == (0, 1.0, 0)
    assert state.decoder.planned == [()]


def test_eager_decode(backend: Any, state: AttentionState) -> None:
    """With packed cells our plan and attention, without them the stock ones."""
    backend.init_forward_metadata(batch())
    assert (len(backend.plans), forward(backend), backend.decoded) == (1, 0.0, 1)
    with state.during(Work(records=[RECORD, None])):
        backend.init_forward_metadata(batch())
        assert (len(backend.plans), forward(backend), backend.decoded) == (1, 1.0, 1)
    assert state.decoder.planned == [[RECORD, None]]  # type: ignore[attr-defined]


def test_prefill_is_planned_by_the_stock_backend(backend: Any, state: AttentionState) -> None:
    with state.during(Work(records=[RECORD])):
        backend.init_forward_metadata(batch(ForwardMode.EXTEND))
        backend.init_forward_metadata_out_graph(batch(ForwardMode.EXTEND))
    assert len(backend.plans) == 2


MORE_THAN_STOCK = ("queries", "sums", "extends", "packs", "verifies")


@pytest.mark.parametrize("work", MORE_THAN_STOCK)
def test_more_than_stock_runs_eagerly(work: str, backend: Any, state: AttentionState) -> None:
    prefill = batch(ForwardMode.EXTEND)
    assert backend.can_run_prefill_cuda_graph(prefill)
    state.extender.plan = lambda jobs: None  # type: ignore[method-assign]
    with state.during(Work(**{work: [object()]})):  # type: ignore[arg-type]
        assert not backend.can_run_prefill_cuda_graph(prefill)
    assert backend.can_run_prefill_cuda_graph(prefill)
    prefill.small = False
    assert not backend.can_run_prefill_cuda_graph(prefill)


def test_shared_reads_end_later_for_packed_cells_alone(backend: Any, state: AttentionState) -> None:
    stock = {mode: AttentionBackend.shared_read_ends(backend, mode) for mode in ForwardMode}
    assert {mode: backend.shared_read_ends(mode) for mode in ForwardMode} == stock
    changed = {ForwardMode.DECODE: SharedReadEnds.POST_REPLAY}
    with state.during(Work(records=[RECORD])):
        assert {mode: backend.shared_read_ends(mode) for mode in ForwardMode} == stock | changed


class Extender:
    """Answers 2 in the rows of its jobs, or in all rows of drafts."""

    def __init__(self) -> None:
        self.jobs: Any = ()
        self.drafts: Any = None

    def plan(self, jobs: Any) -> None:
        self.jobs = jobs

    def plan_drafts(self, drafts: Any) -> None:
        self.drafts, self.jobs = drafts, [job(0, drafts.tree.shape[0] * drafts.tree.shape[1], 0)]

    def attend(self, q: torch.Tensor, out: torch.Tensor, layer: Any) -> None:
        for job in self.jobs:
            out[job.source] = 2.0


class SpiedStock(AttentionBackend):
    """Keeps the batches that it is asked to plan and to attend to; answers 0."""

    def __init__(self) -> None:
        self.planned: list[Any] = []
        self.attended: list[Any] = []

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self.planned.append(forward_batch)

    def forward(self, q: Any, k: Any, v: Any, layer: Any, batch: Any, **kwargs: Any) -> Any:
        self.attended.append(batch)
        return torch.zeros_like(q)


def prefill(prefixes: list[int], lengths: list[int]) -> Any:
    """The lengths of a ForwardBatch (model_executor/forward_batch_info.py, init_new)."""
    ends = [prefix + length for prefix, length in zip(prefixes, lengths, strict=True)]
    return SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        out_cache_loc=torch.arange(1, 1 + sum(lengths)),
        extend_prefix_lens=torch.tensor(prefixes, dtype=torch.int32),
        extend_prefix_lens_cpu=prefixes,
        extend_seq_lens=torch.tensor(lengths, dtype=torch.int32),
        extend_seq_lens_cpu=lengths,
        seq_lens=torch.tensor(ends),
        seq_lens_cpu=torch.tensor(ends),
        seq_lens_sum=sum(ends),
    )


def job(start: int, end: int, first_row: int) -> ExtendJob:
    return ExtendJob(RECORD, start, end, slice(first_row, first_row + end - start))


@pytest.fixture
def spied() -> Any:
    """A compressing backend around SpiedStock whose pool notes what is written."""
    written: list[Any] = []
    pool: Any = SimpleNamespace(
        plane=lambda layer: layer.layer_id, write=lambda *args: written.append(args)
    )
    backend = SpiedStock()
    adopt(backend, AttentionState(pool, Decoder(), Extender(), get_capture_attention_variant))
    backend.written = written  # type: ignore[attr-defined]
    return backend


def run(backend: Any, batch: Any, work: Work, **kwargs: Any) -> list[float]:
    """A prefill of one layer as the eager runner leads it; the rows' results."""
    q = torch.zeros(sum(batch.extend_seq_lens_cpu), 6)
    with backend.aircache.during(work):
        backend.init_forward_metadata(batch)
        out = backend.forward(q, q, q, LAYER, batch, **kwargs)
    assert out.shape == q.shape
    return out[:, 0].tolist()  # type: ignore[no-any-return]


def test_a_prefill_of_follow_ups_alone_runs_no_stock_attention(spied: Any) -> None:
    batch = prefill([40, 50], [2, 3])
    work = Work(extends=[job(40, 42, 0), job(50, 53, 2)], extends_all=True)
    assert run(spied, batch, work) == [2.0] * 5
    assert spied.planned == spied.attended == []
    ((layer, slots, k, v),) = spied.written
    assert layer is LAYER and slots is batch.out_cache_loc and len(k) == len(v) == 5
    # RoPE fused with the write leaves nothing to write.
    run(spied, batch, work, save_kv_cache=False)
    assert len(spied.written) == 1


def test_stock_attention_does_not_read_what_follow_ups_extend(spied: Any) -> None:
    """In a mixed batch it sees their new tokens alone, and the others as they are."""
    batch = prefill([7, 40, 0, 50], [4, 2, 5, 3])
    work = Work(extends=[job(40, 42, 4), job(50, 53, 11)])
    assert run(spied, batch, work) == [0.0] * 4 + [2.0] * 2 + [0.0] * 5 + [2.0] * 3
    (seen,) = {id(b): b for b in (*spied.planned, *spied.attended)}.values()
    assert len(spied.planned) == len(spied.attended) == 1 and spied.written == []
    assert seen.extend_prefix_lens_cpu == seen.extend_prefix_lens.tolist() == [7, 0, 0, 0]
    assert seen.seq_lens.tolist() == seen.seq_lens_cpu.tolist() == [11, 2, 5, 3]
    assert seen.seq_lens_sum == 21 and seen.out_cache_loc is batch.out_cache_loc
    for name in ("extend_prefix_lens", "seq_lens", "seq_lens_cpu"):
        assert getattr(seen, name).dtype == getattr(batch, name).dtype
    # SGLang's own batch, from which logits are taken, is as it was.
    assert batch.extend_prefix_lens_cpu == [7, 40, 0, 50] and batch.seq_lens_sum == 111


def test_other_prefills_are_handed_on_as_they_are(spied: Any) -> None:
    batch = prefill([7, 0], [4, 5])
    assert run(spied, batch, Work()) == [0.0] * 9
    assert spied.planned[0] is spied.attended[0] is batch


def verify_step() -> Any:
    """Two requests of 7 and 4 tokens with 3 drafts each, in a chain."""
    chain = torch.ones(3, 3, dtype=torch.bool).tril()
    masks = [torch.cat([torch.ones(3, n, dtype=torch.bool), chain], dim=1) for n in (7, 4)]
    return SimpleNamespace(
        forward_mode=ForwardMode.TARGET_VERIFY,
        out_cache_loc=torch.arange(1, 7),
        req_pool_indices=torch.tensor([2, 1]),
        seq_lens=torch.tensor([7, 4]),
        extend_seq_lens_cpu=[3, 3],
        spec_info=SimpleNamespace(
            draft_token_num=3, custom_mask=torch.cat([mask.flatten() for mask in masks])
        ),
    )


def test_drafts_of_a_batch_with_packed_cells_are_ours(spied: Any) -> None:
    step = verify_step()
    assert run(spied, step, Work(records=[RECORD, None], verifies=True)) == [2.0] * 6
    assert spied.planned == spied.attended == []
    drafts = spied.aircache.extender.drafts
    assert drafts.records == [RECORD, None] and drafts.rows is step.req_pool_indices
    assert drafts.seq_lens.tolist() == [10, 7]
    assert torch.equal(drafts.tree, torch.ones(2, 3, 3, dtype=torch.bool).tril())
    ((layer, slots, k, v),) = spied.written
    assert layer is LAYER and slots is step.out_cache_loc and len(k) == len(v) == 6


def test_drafts_of_other_batches_are_handed_on(spied: Any) -> None:
    step = verify_step()
    assert run(spied, step, Work()) == [0.0] * 6
    assert spied.planned[0] is spied.attended[0] is step and spied.written == []


def capture_step(spied: Any, size: int) -> Any:
    """A graph of ours of a verify step is captured; the batch of SGLang's static buffers."""
    chain = torch.ones(3, 3, dtype=torch.bool).tril()
    step = SimpleNamespace(
        forward_mode=ForwardMode.TARGET_VERIFY,
        batch_size=size,
        out_cache_loc=torch.arange(3 * size),
        req_pool_indices=torch.zeros(size, dtype=torch.int64),
        seq_lens=torch.ones(size, dtype=torch.int64),
        spec_info=SimpleNamespace(draft_token_num=3, custom_mask=chain.flatten()),
    )
    _set_capture_attention_variant(COMPRESSED)
    spied.init_forward_metadata_out_graph(step, in_capture=True)
    spied.init_forward_metadata_in_graph(step)
    q = torch.zeros(3 * size, 6)
    assert float(spied.forward(q, q, q, LAYER, step).mean()) == 2.0
    return step


def test_graphs_of_verify_steps_read_one_buffer_of_trees(spied: Any) -> None:
    """Whatever is replayed, the trees of its requests are those of this step."""
    read = {}
    for size in (4, 2):
        capture_step(spied, size)
        read[size] = spied.aircache.extender.drafts.tree
        assert torch.equal(read[size], torch.ones(size, 3, 3, dtype=torch.bool).tril())
    assert spied.planned == spied.attended == []
    assert read[2].data_ptr() == read[4].data_ptr()
    with pytest.raises(AssertionError, match="a larger batch came later"):
        capture_step(spied, 5)

    live = verify_step()
    fork = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    masks = [torch.cat([torch.ones(3, n, dtype=torch.bool), fork], dim=1) for n in (7, 4)]
    live.spec_info.custom_mask = torch.cat([mask.flatten() for mask in masks])
    # As SGLang replays it: padded to a size that was captured.
    live.batch_size, live.seq_lens = 4, torch.tensor([7, 4, 1, 1])
    with spied.aircache.during(Work(records=[RECORD, None], verifies=True)):
        spied.init_forward_metadata_out_graph(live)
    assert torch.equal(read[2], fork.repeat(2, 1, 1))
    assert torch.equal(read[4][2:], torch.ones(2, 3, 3, dtype=torch.bool).tril())


def test_stock_graphs_of_verify_steps_are_left_alone(spied: Any) -> None:
    asked: list[Any] = []
    spied_class = type(spied).__mro__[1]
    spied_class.init_forward_metadata_out_graph = lambda self, batch, in_capture=False: (
        asked.append(in_capture)
    )
    try:
        _set_capture_attention_variant(PLAIN)
        spied.init_forward_metadata_out_graph(verify_step(), in_capture=True)
        _set_capture_attention_variant(None)
        spied.init_forward_metadata_out_graph(verify_step())
    finally:
        del spied_class.init_forward_metadata_out_graph
    assert asked == [True, False]


def test_shared_reads_of_drafts_of_ours_end_behind_the_replay(spied: Any) -> None:
    mode = ForwardMode.TARGET_VERIFY
    stock = spied.shared_read_ends(mode)
    assert stock is not SharedReadEnds.POST_REPLAY
    with spied.aircache.during(Work(records=[RECORD], verifies=True)):
        assert spied.shared_read_ends(mode) is SharedReadEnds.POST_REPLAY
    assert spied.shared_read_ends(mode) is stock


def test_beams_read_no_gap_that_an_earlier_request_left() -> None:
    """Nor where nothing is packed: with deterministic inference all steps are ours."""
    table = CompressionTable(torch.zeros(4, 8, dtype=torch.int32), 2)
    for row in (1, 2):
        table.set(row, 1, 4, torch.tensor([2, 2]))
    compressor: Any = SimpleNamespace(arriving={}, records={}, table=table)
    batch = SimpleNamespace(
        reqs=[SimpleNamespace(kv=SimpleNamespace(req_pool_idx=3))],
        req_pool_indices=torch.tensor([3, 2]),
    )
    assert Compressor._decode_work(compressor, batch) == Work()
    assert table.gap_len.tolist() == [0, 4, 0, 0]
