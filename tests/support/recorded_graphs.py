# SPDX-License-Identifier: Apache-2.0
"""A graph backend for SGLang's decode graph runner that needs no GPU (recording_platform.py).

A recorded graph holds what a CUDA graph holds: every
torch operator and every Triton launch of one forward, with the tensors and numbers it was called
with. A replay does these again and runs no other Python, so what the host decided at capture stays
decided. A read of a tensor's value by the host ends a capture, as it does on a GPU.

A replay of our variant is compared, bit for bit, with the forward run again in Python on the same
buffers. That of the stock variant cannot be: its Python reads metadata that only its capture has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sglang.srt.model_executor.runner_backend.base_cuda_graph_backend import BaseCudaGraphBackend
from sglang.srt.model_executor.runner_utils.capture_mode import (
    _set_capture_attention_variant,
    get_capture_attention_variant,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

from aircache_patches import process
from aircache_sglang.engine.backend import COMPRESSED

# Reads of a tensor's value by the host; `tolist` of a CPU tensor passes no dispatcher.
HOST_READS = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::item"}


class Graph(TorchDispatchMode):
    """The operators and launches of one call, to be done again in place."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self.kernels: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().partition(".")[0] in HOST_READS:
            raise RuntimeError(f"{func.name()} while a graph is captured")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        launch = GridExecutor.__call__

        def record(executor: Any, *args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():
                launch(executor, *args, **kwargs)
            self.kernels.add(executor.fn.__name__)
            self.calls.append((lambda *a, **k: launch(executor, *a, **k), args, kwargs, None))

        GridExecutor.__call__ = record
        try:
            with self:
                yield
        finally:
            GridExecutor.__call__ = launch

    def replay(self) -> None:
        """Do all again; what an operator returns goes where it went when it was captured."""
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                # A view, or an operator in place, returns the captured memory itself.
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class RecordingBackend(BaseCudaGraphBackend):  # type: ignore[misc]
    """In place of FullCudaGraphBackend (runner_backend/full_cuda_graph_backend.py)."""

    def __init__(self, runner: Any, *, enable_memory_saver: bool) -> None:
        assert not enable_memory_saver
        self.captured: dict[Any, tuple[Graph, Callable[[], Any], Any]] = {}

    @contextlib.contextmanager
    def capture_session(self, stream: Any) -> Iterator[None]:
        yield

    def capture_one(
        self,
        shape_key: Any,
        forward_fn: Callable[[], Any],
        capture_inputs: Any = None,
        post_warmup_hook: Callable[[], None] | None = None,
    ) -> None:
        # No warm-up, and so nothing to mend behind one: nothing is compiled here.
        graph = Graph()
        with graph.recording():
            output = forward_fn()
        assert shape_key not in self.captured, shape_key
        self.captured[shape_key] = graph, forward_fn, output
        say(f"captured {name(shape_key)}: {' '.join(sorted(graph.kernels))}")

    def can_run(self, forward_batch: Any, shape_key: Any) -> bool:
        return shape_key in self.captured

    @contextlib.contextmanager
    def replay_session(self) -> Iterator[None]:
        yield

    def replay(self, shape_key: Any, static_forward_batch: Any, **kwargs: Any) -> Any:
        graph, forward_fn, output = self.captured[shape_key]
        graph.replay()
        if shape_key.attention_variant == COMPRESSED:
            replayed = output.next_token_logits.clone()
            with capturing(shape_key.attention_variant):
                eager = forward_fn().next_token_logits
            assert torch.equal(replayed, eager), f"{name(shape_key)} differs from its forward"
        rows = static_forward_batch.req_pool_indices
        packed = int((process.compressor().table.gap_len[rows] > 0).sum())
        say(f"replayed {name(shape_key)} for {len(rows)} rows, {packed} packed")
        return output

    def cleanup(self) -> None:
        self.captured.clear()


@contextlib.contextmanager
def capturing(variant: str) -> Iterator[None]:
    """Let the backend choose as when this variant was captured."""
    before = get_capture_attention_variant()
    _set_capture_attention_variant(variant)
    try:
        yield
    finally:
        _set_capture_attention_variant(before)


def name(shape_key: Any) -> str:
    return f"{shape_key.size} {shape_key.attention_variant}"


def say(what: str) -> None:
    print(f"recorded graphs: {what}", flush=True)
