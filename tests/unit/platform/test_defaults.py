# SPDX-License-Identifier: Apache-2.0
"""What the plain-CPU platform fills in, and what it leaves to the user."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aircache_sglang.platform import has_accelerator

if has_accelerator():
    pytest.skip("the plain-CPU platform is for machines without one", allow_module_level=True)

from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig

from aircache_sglang.platform import cpu


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    environ, pin_memory = dict(os.environ), torch.Tensor.pin_memory
    synchronize = torch.cuda.synchronize
    modules = [importlib.import_module(name) for name in cpu.LORA_MODULES]
    seen: list[Any] = [module.torch for module in modules]  # type: ignore[attr-defined]
    yield
    for module, name in zip(modules, seen, strict=True):
        module.torch = name  # type: ignore[attr-defined]
    os.environ.clear()
    os.environ.update(environ)
    torch.Tensor.pin_memory = pin_memory  # type: ignore[method-assign]
    torch.cuda.synchronize = synchronize


def resolved(**given: Any) -> SimpleNamespace:
    """Arguments as SGLang hands them over, after its own handle_cpu_backends."""
    args = SimpleNamespace(
        attention_backend="intel_amx",
        speculative_algorithm=None,
        kv_policy="none",
        cuda_graph_config=CudaGraphConfig(),
        max_total_tokens=None,
        mem_fraction_static=None,
        max_running_requests=None,
        lora_backend="csgmv",
        hicache_io_backend="kernel",
        disaggregation_mode="null",
        disaggregation_decode_retraction_backup=None,
        tp_size=1,
        pp_size=1,
        dp_size=1,
    )
    vars(args).update(given)
    cpu.PlainCpuPlatform().apply_server_args_defaults(args)
    return args


def test_defaults() -> None:
    args = resolved()
    assert args.attention_backend == "torch_native"
    assert args.cuda_graph_config.decode.backend == "disabled"
    assert args.cuda_graph_config.prefill.backend == "disabled"
    assert args.max_total_tokens == 65_536
    assert args.max_running_requests == 64
    assert args.lora_backend == "torch_native"
    assert args.hicache_io_backend == "direct"
    assert args.mem_fraction_static is None
    assert args.sleep_on_idle is True


def test_the_users_choices_stay() -> None:
    args = resolved(
        attention_backend="triton",
        max_total_tokens=77,
        max_running_requests=3,
        lora_backend="triton",
    )
    assert args.attention_backend == args.lora_backend == "triton"
    assert (args.max_total_tokens, args.max_running_requests) == (77, 3)


def test_drafts_need_an_attention_with_a_mask() -> None:
    resolved(speculative_algorithm="NGRAM", kv_policy="aircache")
    with pytest.raises(ValueError, match="torch_native has no mask for the drafts"):
        resolved(speculative_algorithm="NGRAM")
    resolved(speculative_algorithm="NGRAM", attention_backend="triton")


def test_a_memory_fraction_lifts_the_token_limit() -> None:
    args = resolved(mem_fraction_static=0.4)
    assert args.max_total_tokens is None
    assert args.mem_fraction_static == 0.4


def test_ranks_share_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang.srt.utils.common.get_cpu_ids_by_node", lambda: ["0,1,2,3,4"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 0, 1, 3, 2})
    for name in ("SGLANG_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    args = resolved(tp_size=2)
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "0,1|2,3"
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert args.mem_fraction_static == 0.4


def test_more_ranks_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang.srt.utils.common.get_cpu_ids_by_node", lambda: ["0,1"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    resolved(tp_size=2, dp_size=2)
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "0|1|0|1"
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_a_users_binding_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang.srt.utils.common.get_cpu_ids_by_node", lambda: ["0,1"])
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "1|0")
    resolved(tp_size=2)
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "1|0"


def test_one_rank_a_numa_node_is_left_to_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang.srt.utils.common.get_cpu_ids_by_node", lambda: ["0,1", "2,3"])
    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND", raising=False)
    resolved(tp_size=2)
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in os.environ


def test_a_container_limit_bounds_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = cpu.PlainCpuPlatform()
    monkeypatch.setattr("sglang.srt.utils.common.get_instance_memory_status", lambda path: None)
    total = platform.get_device_total_memory()
    monkeypatch.setattr("sglang.srt.utils.common.get_instance_memory_status", lambda path: 1 << 30)
    assert total > platform.get_device_total_memory() == 1 << 30


def test_adapters_are_pageable_and_torch_is_its_own() -> None:
    cpu.PlainCpuPlatform()
    cpu.let_adapters_be_pageable()
    for name in cpu.LORA_MODULES:
        theirs = importlib.import_module(name).torch
        assert theirs.tensor([1, 2], dtype=torch.int32, pin_memory=True).tolist() == [1, 2]
        assert theirs.zeros((3,), pin_memory=True).tolist() == [0.0, 0.0, 0.0]
        assert theirs.Tensor is torch.Tensor and theirs.nn is torch.nn
    with pytest.raises(RuntimeError):
        torch.zeros(3, pin_memory=True)
    with torch.device("meta"):
        assert torch.zeros(3).is_meta


def test_waiting_for_the_device_returns() -> None:
    cpu.PlainCpuPlatform()
    torch.get_device_module().synchronize()
