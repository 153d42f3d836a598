# SPDX-License-Identifier: Apache-2.0
"""What the kernels are called with on a GPU, seen without one: fake tensors on `cuda`.

Serving at Qwen2-VL-7B's shape, with launches noted in place of run. A fake tensor has no values, so
whatever asks for one on the host raises; copies that would wait for the device are looked for too.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from aircache_kernels import build_flashinfer_tables, launch
from aircache_kernels.validation import FP8_DTYPE
from aircache_sglang.config import AirCacheConfig
from aircache_sglang.policy import columns
from aircache_sglang.runtime.compress import PassInputs
from aircache_sglang.runtime.decide import Intent
from aircache_sglang.runtime.drafts import Drafts
from aircache_sglang.runtime.extend import ExtendJob
from aircache_sglang.runtime.kernel_decode import KernelDecoder
from aircache_sglang.runtime.kernel_extend import KernelExtender
from aircache_sglang.runtime.kernel_pass import KernelPass
from aircache_sglang.runtime.record import CompressionRecord
from aircache_sglang.runtime.spans import VisualPrompt
from aircache_sglang.runtime.stash import Job
from aircache_sglang.runtime.table import CompressionTable
from tests.support.one_rank import ONE_RANK
from tests.unit.kernels.compile_for_gpu import SERVED, Shape, attention_kernels, pass_kernels
from tests.unit.kernels.test_compile import KERNELS

TENSOR = torch.tensor
ROWS, CONTEXT, REQUESTS = 400_001, 40_960, 64
CUDA = torch.device("cuda", 0)
SHAPE = SERVED["qwen2-vl-7b"]
PROMPTS = (
    VisualPrompt(spans=((15, 16399),), length=16440, n_visual=16384),
    VisualPrompt(spans=((4, 1027), (1031, 2055)), length=2300, n_visual=2047),
)
# `joined` compares addresses, and takes the fake ones for those of separate buffers.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
TYPES = pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, FP8_DTYPE),
    ],
    ids=str,
)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: grid, and what each parameter of the kernel got."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {n: a for n, a in self.arguments.items() if isinstance(a, torch.Tensor)}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self.tensors.items()}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """What is launched; nothing runs, on a device of 132 multiprocessors."""
    noted: list[Launch] = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert not warmup
        names = self.arg_names
        arguments = dict(zip(names, args, strict=False))
        assert not arguments.keys() & kwargs.keys()
        arguments |= {name: value for name, value in kwargs.items() if name in names}
        assert arguments.keys() == set(names), set(names) ^ arguments.keys()
        noted.append(Launch(self.__name__, tuple(grid), arguments))

    monkeypatch.setattr(triton.runtime.interpreter.InterpretedFunction, "run", note)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    launch.multiprocessors.cache_clear()
    yield noted
    launch.multiprocessors.cache_clear()


class NoWaiting(TorchDispatchMode):
    """Raises where the host would wait for the device: a copy that is not said to be asynchronous,
    or one to the device from memory that is not pinned.

    Pinning needs a driver, so what asks for it is remembered instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[torch.Tensor] = []

    def tensor(self, *args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        """In place of torch.tensor."""
        made = TENSOR(*args, **kwargs)
        if pin_memory:
            self.pinned.append(made)
        return made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default and args[0].device.type != result.device.type:
            assert kwargs.get("non_blocking"), f"a copy to {result.device.type} waits"
            if result.device.type == "cuda":
                assert any(args[0] is made for made in self.pinned), "a copy of pageable memory"
        return result


class Served:
    """Two prefilled requests on a GPU that is not there."""

    def __init__(self, shape: Shape, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        # As engine/kv_pool.py makes it: both planes in one tensor.
        planes = torch.empty(
            2, shape.layers, ROWS, shape.n_kv, shape.head_dim, dtype=kv_dtype, device=CUDA
        )
        req_to_token = torch.zeros(REQUESTS + 1, CONTEXT, dtype=torch.int32, device=CUDA)
        self.table = CompressionTable(req_to_token, shape.layers)
        self.scale = shape.head_dim**-0.5
        self.inputs = PassInputs(planes[0], planes[1], self.table, ONE_RANK, self.scale)
        self.pool = SimpleNamespace(
            k_all=planes[0],
            v_all=planes[1],
            rows=ROWS,
            layer_num=shape.layers,
            plane=lambda layer: layer.layer_id,
        )
        self.layer = SimpleNamespace(layer_id=shape.layers - 1, scaling=self.scale)

    def queries(self, *sizes: int) -> torch.Tensor:
        return torch.empty(
            *sizes, self.shape.n_q, self.shape.head_dim, dtype=self.dtype, device=CUDA
        )

    def jobs(self, config: AirCacheConfig) -> list[Job]:
        found = []
        for row, prompt in enumerate(PROMPTS, start=3):
            intent = Intent(config, prompt, columns(config.retention, prompt.n_visual))
            originals = self.table.req_to_token[row, : prompt.end].long()
            extra = torch.empty(intent.n_extra, dtype=torch.int64, device=CUDA)
            lo, hi = prompt.instruction
            q = self.queries(self.shape.layers, hi - lo)
            found.append(Job(CompressionRecord(intent, row, originals, extra), q))
        return found


@contextlib.contextmanager
def on_fake_cuda() -> Iterator[None]:
    waiting = NoWaiting()
    with FakeTensorMode(), waiting, mock.patch("torch.tensor", waiting.tensor):
        yield


@pytest.fixture
def fake() -> Iterator[None]:
    with on_fake_cuda():
        yield


def pass_of(served: Served, **settings: Any) -> Callable[[], None]:
    jobs = served.jobs(dataclasses.replace(AirCacheConfig(), return_selection=True, **settings))
    return lambda: KernelPass(served.inputs)(jobs)


def decode_of(served: Served, batch: int, index: torch.dtype) -> Callable[[], None]:
    rows, lens = (torch.ones(batch, dtype=index, device=CUDA) for _ in range(2))
    forward_batch = SimpleNamespace(req_pool_indices=rows, seq_lens=lens)
    decoder = KernelDecoder(served.pool, served.table)
    # A model's queries are a part of its fused projection.
    width = (served.shape.n_q + 2 * served.shape.n_kv) * served.shape.head_dim
    fused = torch.empty(batch, width, dtype=served.dtype, device=CUDA)
    q = fused[:, : served.shape.n_q * served.shape.head_dim]
    heads = q.reshape(-1, served.shape.n_q, served.shape.head_dim)
    return lambda: check_out(decoder.attend(heads, served.layer, forward_batch), heads)


def check_out(out: torch.Tensor, q: torch.Tensor) -> None:
    assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device)
    assert out.is_contiguous()


def extend_of(served: Served) -> Callable[[], None]:
    extender, jobs, first = KernelExtender(served.pool, served.table), [], 5
    for job, n in zip(served.jobs(AirCacheConfig()), (17, 1), strict=True):
        end = job.record.intent.prompt.length + n
        jobs.append(ExtendJob(job.record, end - n, end, slice(first, first + n)))
        first += n

    def run() -> None:
        extender.plan(jobs)
        q = served.queries(first)
        extender.attend(q, torch.empty_like(q), served.layer)

    return run


def verify_of(served: Served, batch: int, n: int) -> Callable[[], None]:
    """n drafts of each request, and SGLang's mask for prefixes of up to 40 tokens."""
    rows, lens = (torch.ones(batch, dtype=torch.int64, device=CUDA) for _ in range(2))
    mask = torch.empty(batch * n * (40 + n), dtype=torch.bool, device=CUDA)
    forward_batch = SimpleNamespace(
        req_pool_indices=rows,
        seq_lens=lens,
        spec_info=SimpleNamespace(custom_mask=mask, draft_token_num=n),
    )
    extender, q = KernelExtender(served.pool, served.table), served.queries(batch * n)

    def run() -> None:
        extender.plan_drafts(Drafts.of(forward_batch, [None] * batch))
        extender.attend(q, torch.empty_like(q), served.layer)

    return run


def page_tables_of(served: Served, batch: int) -> Callable[[], None]:
    """As FlashInferDecoder keeps them (runtime/flashinfer_decode.py), for some pages."""
    rows, lens = (torch.ones(batch, dtype=torch.int64, device=CUDA) for _ in range(2))
    layers = served.shape.layers
    outputs = {
        name: torch.empty(*shape, dtype=torch.int32, device=CUDA)
        for name, shape in (
            ("kv_indptr", (layers, batch + 1)),
            ("kv_indices", (layers, 4096)),
            ("last_page_len", (batch,)),
        )
    }
    return lambda: build_flashinfer_tables(served.table.tables, rows, lens, rows=ROWS, **outputs)


def check(noted: list[Launch]) -> None:
    """All on the GPU, aligned as compiled, in a grid that CUDA takes."""
    assert noted
    for one in noted:
        for name, tensor in one.tensors.items():
            where = f"{one.kernel}({name})"
            assert tensor.device == CUDA, where
            # Code is compiled for pointers at 16 bytes; another alignment would compile anew.
            assert tensor.storage_offset() * tensor.element_size() % 16 == 0, where
            assert tensor.stride(-1) == 1 or tensor.shape[-1] == 1, where
        assert all(isinstance(n, int) and n >= 1 for n in one.grid), one
        x, *others = one.grid
        assert x < 2**31 and all(n < 2**16 for n in others), (one.kernel, one.grid)


@pytest.mark.parametrize(
    "settings",
    [{}, {"elite": "shared", "budget": "strength"}, {"window": "last-3", "alpha": 0.3}],
    ids=str,
)
@TYPES
def test_pass(
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    settings: dict[str, Any],
    launches: list[Launch],
    fake: None,
) -> None:
    run = pass_of(Served(SHAPE, dtype, kv_dtype), **settings)
    run()
    check(launches)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 64, 1024])
@TYPES
def test_decode(
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    batch: int,
    index: torch.dtype,
    launches: list[Launch],
    fake: None,
) -> None:
    run = decode_of(Served(SHAPE, dtype, kv_dtype), batch, index)
    run()
    check(launches)
    assert [one.kernel for one in launches] == ["_decode_stage1_kernel", "_decode_stage2_kernel"]


@TYPES
def test_extend(
    dtype: torch.dtype, kv_dtype: torch.dtype, launches: list[Launch], fake: None
) -> None:
    extend_of(Served(SHAPE, dtype, kv_dtype))()
    check(launches)
    assert [one.kernel for one in launches] == ["_extend_fwd_kernel"]


@pytest.mark.parametrize("batch", [1, 3, 64])
@TYPES
def test_verify(
    dtype: torch.dtype, kv_dtype: torch.dtype, batch: int, launches: list[Launch], fake: None
) -> None:
    verify_of(Served(SHAPE, dtype, kv_dtype), batch, 12)()
    check(launches)
    assert [one.kernel for one in launches] == ["_extend_fwd_kernel"]


@TYPES
def test_the_types_that_are_compiled(
    dtype: torch.dtype, kv_dtype: torch.dtype, launches: list[Launch]
) -> None:
    """Serving asks for the types that compile_for_gpu.py compiles, for every kernel of both."""
    pass_kernels(SHAPE, dtype, kv_dtype, "per-head")
    attention_kernels(SHAPE, dtype, kv_dtype, [16])
    compiled: dict[str, list[dict[str, torch.dtype]]] = {}
    for one in launches:
        compiled.setdefault(one.kernel, []).append(one.dtypes)
    assert set(compiled) == KERNELS
    launches.clear()
    with on_fake_cuda():
        served = Served(SHAPE, dtype, kv_dtype)
        for run in (
            pass_of(served),
            pass_of(served, budget="aircache"),
            decode_of(served, 16, torch.int64),
            extend_of(served),
            verify_of(served, 16, 12),
            page_tables_of(served, 16),
        ):
            run()
    check(launches)
    assert {one.kernel for one in launches} == KERNELS
    for one in launches:
        assert one.dtypes in compiled[one.kernel], (one.kernel, one.dtypes, compiled[one.kernel])


def test_waiting_is_found(fake: None) -> None:
    """The guard itself: what would wait raises, what would not passes."""
    value = torch.zeros(3, device=CUDA)
    for waits in (
        value.sum().item,
        value.tolist,
        value.nonzero,
        value.cpu,
        lambda: torch.tensor([1]).to(CUDA),
        lambda: torch.tensor([1]).to(CUDA, non_blocking=True),
        lambda: torch.tensor([1], pin_memory=True).to(CUDA),
    ):
        with pytest.raises(
            (AssertionError, DataDependentOutputException, DynamicOutputShapeException)
        ):
            waits()
    value.to("cpu", non_blocking=True)
    torch.tensor([1], pin_memory=True).to(CUDA, non_blocking=True)
