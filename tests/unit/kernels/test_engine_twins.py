# SPDX-License-Identifier: Apache-2.0
"""The engine's two implementations, torch and Triton, on the same pool and requests."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from aircache_sglang.config import POLICIES, Ablation, AirCacheConfig
from aircache_sglang.runtime import kernel_pass, transfer
from aircache_sglang.runtime.compress import PassInputs, TorchPass
from aircache_sglang.runtime.decide import Intent, rungs_of
from aircache_sglang.runtime.decode import TorchDecoder
from aircache_sglang.runtime.drafts import Drafts
from aircache_sglang.runtime.extend import ExtendJob, TorchExtender
from aircache_sglang.runtime.kernel_decode import KernelDecoder
from aircache_sglang.runtime.kernel_extend import KernelExtender
from aircache_sglang.runtime.kernel_pass import KernelPass
from aircache_sglang.runtime.record import CompressionRecord
from aircache_sglang.runtime.spans import Chunk, VisualPrompt
from aircache_sglang.runtime.stash import BatchStash, Job, QueryStash, joined
from aircache_sglang.runtime.table import CompressionTable
from tests.support.batch_invariant import batch_invariant
from tests.support.one_rank import ONE_RANK
from tests.unit.kernels.test_package import launches, on_cpu

CPU = torch.device("cpu")
L, H_KV, H_Q, D, ROWS, CONTEXT = 3, 2, 6, 16, 700, 256


@dataclasses.dataclass
class Side:
    """One copy of pool, table and requests, to be worked on by one implementation."""

    inputs: PassInputs
    jobs: list[Job]

    @property
    def pool(self) -> Any:
        return SimpleNamespace(
            k_all=self.inputs.k_all,
            v_all=self.inputs.v_all,
            rows=ROWS,
            layer_num=L,
            model_layer_ids=tuple(range(L)),
            plane=lambda layer: layer.layer_id,
        )


PROMPTS = (
    VisualPrompt(spans=((5, 68),), length=90, n_visual=63),
    VisualPrompt(spans=((0, 40), (43, 114), (115, 120)), length=131, n_visual=116),
    VisualPrompt(spans=((17, 81),), length=82, n_visual=64),
)


def build(
    configs: list[AirCacheConfig],
    kv_dtype: torch.dtype = torch.float32,
    n_layers: int = L,
    device: torch.device = CPU,
) -> Side:
    """Three prefilled requests in rows 1 to 3, an uncompressed one of 50 tokens in row 4."""
    g = torch.Generator().manual_seed(7)
    k_all = torch.randn(n_layers, ROWS, H_KV, D, generator=g).to(kv_dtype).to(device)
    v_all = torch.randn(n_layers, ROWS, H_KV, D, generator=g).to(kv_dtype).to(device)
    req_to_token = torch.zeros(8, CONTEXT, dtype=torch.int32, device=device)
    slots = 1 + torch.randperm(ROWS - 1, generator=g).to(device)
    taken = 0

    def take(n: int) -> torch.Tensor:
        nonlocal taken
        taken += n
        return slots[taken - n : taken]

    table = CompressionTable(req_to_token, n_layers)
    inputs = PassInputs(k_all, v_all, table, ONE_RANK, D**-0.5)
    jobs = []
    for row, (prompt, config) in enumerate(zip(PROMPTS, configs, strict=True), start=1):
        intent = Intent(config, prompt, max(1, round(config.retention * prompt.n_visual)))
        # Two generated tokens follow each prompt.
        req_to_token[row, : prompt.length + 2] = take(prompt.length + 2)
        originals = req_to_token[row, : prompt.end].long()
        record = CompressionRecord(intent, row, originals, take(intent.n_extra))
        lo, hi = prompt.instruction
        q = 2.0 * torch.randn(n_layers, hi - lo, H_Q, D, generator=g)
        jobs.append(Job(record, q.to(device)))
    req_to_token[4, :50] = take(50)
    return Side(inputs, jobs)


SAME = AirCacheConfig(retention=0.2, return_selection=True)
PAPER = dataclasses.replace(SAME, budget="aircache")
MIXED = (
    SAME,
    dataclasses.replace(SAME, retention=0.5, window="last-3", budget="strength"),
    dataclasses.replace(PAPER, alpha=0.3, elite="shared"),
)


KV_DTYPES = pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float8_e4m3fn], ids=str)


# What the kernels do not have goes to torch, beside a request that they do.
PEERS = (
    SAME,
    dataclasses.replace(SAME, policy="snapkv"),
    dataclasses.replace(SAME, budget="pyramid", ablation=Ablation(merge=0.5)),
)


@KV_DTYPES
@pytest.mark.parametrize(
    "configs",
    [(SAME, SAME, SAME), (PAPER, PAPER, SAME), MIXED, PEERS],
    ids=["one group", "eq. 11", "groups", "peers"],
)
def test_passes_agree(
    configs: tuple[AirCacheConfig, ...], kv_dtype: torch.dtype, device: torch.device
) -> None:
    torch_side, kernel_side = (build(list(configs), kv_dtype, device=device) for _ in range(2))
    TorchPass(torch_side.inputs)(torch_side.jobs)
    KernelPass(kernel_side.inputs)(kernel_side.jobs)
    for ours, theirs in zip(torch_side.jobs, kernel_side.jobs, strict=True):
        assert ours.record.report() == theirs.record.report()
    budgets = [job.record.report()["layer_budgets"] for job in torch_side.jobs]
    assert any(len(set(layers)) > 1 for layers in budgets), "the split over layers is untested"
    for name in ("gap_start", "gap_len", "cell_offset"):
        ours_, theirs_ = (getattr(s.inputs.table, name) for s in (torch_side, kernel_side))
        assert torch.equal(ours_, theirs_), name
    assert torch.equal(torch_side.inputs.table.req_to_token, kernel_side.inputs.table.req_to_token)


PRESSURE = dataclasses.replace(SAME, when="pressure", rungs=(0.6, 0.3, 0.2))


@pytest.mark.parametrize(
    "configs",
    [
        (PRESSURE, PRESSURE, PRESSURE),
        (PRESSURE, dataclasses.replace(PRESSURE, window="last-3"), PRESSURE),
        (PRESSURE, dataclasses.replace(PRESSURE, policy="snapkv"), PRESSURE),
        (dataclasses.replace(PRESSURE, budget="aircache"),) * 3,
    ],
    ids=["one group", "groups", "peers", "eq. 11"],
)
def test_ladders_agree(configs: tuple[AirCacheConfig, ...], device: torch.device) -> None:
    """What is packed later is ranked alike, and ranking touches neither pool nor table."""
    sides = [build(list(configs), device=device) for _ in range(2)]
    fresh = build(list(configs), device=device)
    for side, run in zip(sides, (TorchPass, KernelPass), strict=True):
        for job in side.jobs:
            intent = job.record.intent
            rungs = rungs_of(intent)
            job.record.intent = dataclasses.replace(intent, rungs=rungs)
        run(side.inputs).rank(side.jobs)
        assert torch.equal(side.inputs.k_all, fresh.inputs.k_all)
        assert torch.equal(side.inputs.table.req_to_token, fresh.inputs.table.req_to_token)
    for ours, theirs in zip(*(side.jobs for side in sides), strict=True):
        mine, other = ours.record.ladder, theirs.record.ladder
        assert mine is not None and other is not None
        assert torch.equal(mine.budgets, other.budgets)
        for rung in range(3):
            # Scores that are equal but for rounding may change places within a layer.
            parts = (
                each.selected(rung).split(each.budgets[rung].tolist(), dim=1)
                for each in (mine, other)
            )
            for left, right in zip(*parts, strict=True):
                assert torch.equal(left.sort(dim=1).values, right.sort(dim=1).values)
        torch.testing.assert_close(mine.reported[1], other.reported[1], rtol=0.0, atol=1e-6)


@on_cpu
@pytest.mark.parametrize("policy", POLICIES)
def test_deterministic_inference(policy: str) -> None:
    """Neither pass needs what SGLang then replaces, whose float32 products are no longer exact."""
    config = dataclasses.replace(SAME, policy=policy)
    ladder = dataclasses.replace(config, when="pressure", rungs=(0.6, 0.3, 0.2))
    sides = [build([config] * 3, torch.bfloat16) for _ in range(4)]
    g = torch.Generator().manual_seed(3)
    sums = [torch.rand(L, H_KV, prompt.n_visual, generator=g) for prompt in PROMPTS]
    for side in sides:
        side.jobs[:] = [
            dataclasses.replace(job, q=job.q.bfloat16(), accumulated=accumulated)
            for job, accumulated in zip(side.jobs, sums, strict=True)
        ]
    plain, changed, kernels, later = sides
    for job in later.jobs:
        intent = dataclasses.replace(job.record.intent, config=ladder)
        job.record.intent = dataclasses.replace(intent, rungs=rungs_of(intent))
    TorchPass(plain.inputs)(plain.jobs)
    with batch_invariant():
        with pytest.raises(AssertionError, match=r"unsupported dtype: torch\.float64"):
            torch.ones(2, dtype=torch.float64).mean(dim=0)
        TorchPass(changed.inputs)(changed.jobs)
        KernelPass(kernels.inputs)(kernels.jobs)
        KernelPass(later.inputs).rank(later.jobs)
    for one, *others in zip(*(side.jobs for side in (plain, changed, kernels)), strict=True):
        for other in others:
            left, right = one.record.report(), other.record.report()
            assert left["visual_mass"] == pytest.approx(right["visual_mass"], abs=1e-3)
            if policy == "aircache":
                assert left["selection"] == right["selection"]


class Work(TorchDispatchMode):
    """Names of the operations that would do work on a device, or wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and not name.startswith(("empty", "new_empty")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


KERNELS = (
    *("score", "importance_statistics", "layer_budgets", "global_budgets", "select", "pack"),
    "lay_out_rows",
)


@on_cpu
@pytest.mark.parametrize(("n_requests", "n_layers"), [(1, 2), (3, 5)])
@pytest.mark.parametrize(("budget", "n_kernels"), [("global", 10), ("aircache", 8)])
def test_work_of_the_served_pass(
    n_requests: int, n_layers: int, budget: str, n_kernels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 kernels, one transfer and 6 operations, none of which waits, whatever L and B are.

    The paper's budgets take 2 kernels less.

    On a GPU the budgets and the mass are copied to pinned memory besides, which is no operation on
    a CPU.
    """
    config = dataclasses.replace(SAME, return_selection=False, budget=budget)
    side = build([config] * 3, n_layers=n_layers)
    buffer, first = torch.cat([job.q for job in side.jobs], dim=1), 0
    jobs = []
    for job in side.jobs[:n_requests]:
        # as BatchStash leaves them
        last = first + job.q.shape[1]
        jobs.append(dataclasses.replace(job, q=buffer[:, first:last]))
        first = last
    seen, work = launches(monkeypatch), Work()

    def outside(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return function(*args, **kwargs)

        return run

    for name in KERNELS:
        # the interpreter's own operations are none of a GPU's
        monkeypatch.setattr(kernel_pass, name, outside(getattr(kernel_pass, name)))
    to_device, brought = transfer.to_device, []
    monkeypatch.setattr(
        transfer, "to_device", lambda *args: brought.append(args[2]) or to_device(*args)
    )
    run = KernelPass(side.inputs)
    with work:
        run(jobs)
    assert len(seen) == n_kernels
    # Slots of visual, instruction and columns, and of the text between pictures.
    assert sorted(work.names) == ["cat"] * 4 + ["div", "sum"]
    assert brought == [torch.int32]


def test_queries_of_a_batch() -> None:
    """One buffer for all requests; a request whose instruction was split over two forwards."""
    g = torch.Generator().manual_seed(0)
    steps = [torch.randn(2, 9, 4, 8, generator=g) for _ in range(2)]
    whole, split, late = QueryStash((3, 5)), QueryStash((10, 14)), QueryStash((0, 2))
    for number, q in enumerate(steps):
        batch = BatchStash(2)
        if number == 0:
            whole.claim(Chunk(0, 5, 0), batch)
            split.claim(Chunk(8, 12, 5), batch)
        else:
            split.claim(Chunk(12, 14, 0), batch)
            late.claim(Chunk(0, 7, 2), batch)
        assert len(batch) == 4
        for layer in range(2):
            batch.write(layer, q[layer])
    first, second = steps
    assert torch.equal(whole.queries(), first[:, 3:5])
    assert torch.equal(split.queries(), torch.cat([first[:, 7:9], second[:, 0:2]], dim=1))
    assert torch.equal(late.queries(), second[:, 2:4])
    assert torch.equal(joined([late.queries(), whole.queries()])[:, 2:], first[:, 3:5])


def test_side_by_side_queries_are_not_copied() -> None:
    buffer = torch.randn(3, 10, 2, 4)
    whole = joined([buffer[:, 1:3], buffer[:, 3:4], buffer[:, 4:9]])
    assert whole.data_ptr() == buffer[:, 1:].data_ptr() and torch.equal(whole, buffer[:, 1:9])
    assert torch.equal(joined([buffer[:, 3:4], buffer[:, 1:3]]), buffer[:, [3, 1, 2]])


@KV_DTYPES
def test_decoders_agree(kv_dtype: torch.dtype, device: torch.device) -> None:
    """Each implementation reads what it packed: cell orders may differ, attention must not."""
    sides = [build(list(MIXED), kv_dtype, device=device) for _ in range(2)]
    TorchPass(sides[0].inputs)(sides[0].jobs)
    KernelPass(sides[1].inputs)(sides[1].jobs)
    rows = torch.tensor([3, 4, 1, 2], device=device)
    lengths = [PROMPTS[2].length + 2, 50, PROMPTS[0].length + 1, PROMPTS[1].length]
    seq_lens = torch.tensor(lengths, device=device)
    batch = SimpleNamespace(req_pool_indices=rows, seq_lens=seq_lens)
    q = torch.randn(4, H_Q, D, generator=torch.Generator().manual_seed(1)).to(device)
    outputs = []
    for side, kind in zip(sides, (TorchDecoder, KernelDecoder), strict=True):
        records = {job.record.row: job.record for job in side.jobs}
        decoder = kind(side.pool, side.inputs.table)
        decoder.plan(batch, [records.get(row) for row in rows.tolist()])
        layers = [SimpleNamespace(layer_id=layer, scaling=D**-0.5) for layer in range(L)]
        outputs.append(torch.stack([decoder.attend(q, layer, batch) for layer in layers]))
    assert torch.isfinite(outputs[0]).all()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


@KV_DTYPES
def test_extenders_agree(kv_dtype: torch.dtype, device: torch.device) -> None:
    """The last tokens of two requests, between others' rows, which stay as they are."""
    sides = [build(list(MIXED), kv_dtype, device=device) for _ in range(2)]
    TorchPass(sides[0].inputs)(sides[0].jobs)
    KernelPass(sides[1].inputs)(sides[1].jobs)
    q = torch.randn(20, H_Q, D, generator=torch.Generator().manual_seed(1)).to(device)
    outputs = []
    for side in sides:
        jobs = []
        for number, source in ((1, slice(3, 5)), (0, slice(9, 18))):
            record, n = side.jobs[number].record, source.stop - source.start
            end = record.intent.prompt.length + 2
            jobs.append(ExtendJob(record, end - n, end, source))
        extender = (
            TorchExtender(side.pool, side.inputs.table)
            if side is sides[0]
            else KernelExtender(side.pool, side.inputs.table)
        )
        extender.plan(jobs)
        out = torch.full((L, *q.shape), 7.0, device=device)
        for layer in range(L):
            extender.attend(q, out[layer], SimpleNamespace(layer_id=layer, scaling=D**-0.5))
        outputs.append(out)
    others = torch.ones(20, dtype=torch.bool, device=device)
    others[3:5] = others[9:18] = False
    assert (outputs[0][:, others] == 7.0).all() and not (outputs[0][:, ~others] == 7.0).any()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


# Of three nodes: one after the other, and two that follow the first.
TREES = {
    "chain": [[True, False, False], [True, True, False], [True, True, True]],
    "fork": [[True, False, False], [True, True, False], [True, False, True]],
}


@KV_DTYPES
@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
@pytest.mark.parametrize("tree", TREES)
def test_a_draft_sees_what_it_would_see_decoded(
    tree: str, kernels: bool, kv_dtype: torch.dtype, device: torch.device
) -> None:
    """Each draft as a decode step behind those that it follows, packed requests and others."""
    side = build(list(MIXED), kv_dtype, device=device)
    (KernelPass if kernels else TorchPass)(side.inputs)(side.jobs)
    table, n = side.inputs.table, 3
    rows = torch.tensor([3, 4, 1, 2], device=device)
    lengths = [PROMPTS[2].length + 2, 50, PROMPTS[0].length + 2, PROMPTS[1].length]
    seq_lens = torch.tensor(lengths, device=device)
    by_row = {job.record.row: job.record for job in side.jobs}
    records = [by_row.get(row) for row in rows.tolist()]
    follows = torch.tensor([TREES[tree]] * 4, device=device)
    q = torch.randn(4, n, H_Q, D, generator=torch.Generator().manual_seed(1)).to(device)
    layers = [SimpleNamespace(layer_id=layer, scaling=D**-0.5) for layer in range(L)]

    extender = (KernelExtender if kernels else TorchExtender)(side.pool, table)
    extender.plan_drafts(Drafts(records, rows, seq_lens, follows))
    found = torch.full((L, 4 * n, H_Q, D), float("nan"), device=device)
    for layer in layers:
        extender.attend(q.view(-1, H_Q, D), found[layer.layer_id], layer)

    decoder = TorchDecoder(side.pool, table)
    stored = table.req_to_token.clone()
    for draft in range(n):
        path = follows[0, draft].nonzero().view(-1)
        for row, length in zip(rows.tolist(), lengths, strict=True):
            drafts = stored[row, length - n : length]
            table.req_to_token[row, length - n : length - n + len(path)] = drafts[path]
        batch = SimpleNamespace(req_pool_indices=rows, seq_lens=seq_lens - n + len(path))
        decoder.plan(batch, records)
        expected = torch.stack([decoder.attend(q[:, draft], layer, batch) for layer in layers])
        got = found.view(L, 4, n, H_Q, D)[:, :, draft]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        table.req_to_token.copy_(stored)
