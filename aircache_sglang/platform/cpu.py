# SPDX-License-Identifier: Apache-2.0
"""SGLang on a plain CPU: torch kernels only, no AMX, no accelerator.

An out-of-tree platform, so that SGLang takes neither its CUDA nor its AMX paths. It answers the
platform interface (sglang/srt/platforms/interface.py) and sets the process-wide switches that are
listed in docs/cpu.md. It changes no SGLang code but for n-gram speculation (ngram.py).
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from aircache_sglang.platform import ngram

# sglang.srt.utils.common asks for current_platform while it is being imported, and so loads this
# module: everything that needs it is imported where it is used.

MAX_TOTAL_TOKENS = 65_536
MAX_RUNNING_REQUESTS = 64
SHARED_MEMORY_FRACTION = 0.8
# Of adapters, which ask for pinned tensors by argument: lora/layers.py:475,
# lora/backend/torch_backend.py:236.
LORA_MODULES = ("sglang.srt.lora.layers", "sglang.srt.lora.backend.torch_backend")
LORA_FACTORIES = ("tensor", "zeros")


class PlainCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """The platform of a machine with x86-64 cores and nothing else.

    Constructed once in every process of the server, by SGLang, when the process first asks for
    ``current_platform``.
    """

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def __init__(self) -> None:
        disable_compilation()
        make_pin_memory_a_no_op()
        make_synchronize_a_no_op()

    def init_backend(self) -> None:
        """Runs in each worker, before SGLang builds its pools (model_runner.py:271)."""
        from aircache_sglang.platform.host_pool import serve_host_pools

        serve_host_pools()

    def get_device_total_memory(self, device_id: int = 0) -> int:
        """Bytes this process may use: the machine's memory, or its container's limit."""
        from sglang.srt.utils.common import get_instance_memory_status

        total = super().get_device_total_memory(device_id)
        limit = get_instance_memory_status("/sys/fs/cgroup/memory.max")
        return total if limit is None else min(total, limit)

    def get_device(self, device_id: int | None = 0) -> str:
        """The device's name. A string: without --device, SGLang splits it (serving_hook.py:658)."""
        return "cpu"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU

    def post_load_model(self, model: torch.nn.Module) -> None:
        """In each worker, before adapters are loaded (model_executor/model_runner.py,
        load_model)."""
        let_adapters_be_pageable()
        let_page_lists_be_pageable()
        if any(type(layer).__name__ == "RadixLinearAttention" for layer in model.modules()):
            from aircache_sglang.platform.gated_delta import serve_hybrids

            serve_hybrids()

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm == ngram.ALGORITHM

    def get_speculative_worker_cls(self, algorithm: str) -> type | None:
        return ngram.worker() if algorithm == ngram.ALGORITHM else None

    def get_speculative_cache_locs_fn(self) -> Callable[..., torch.Tensor]:
        return ngram.draft_slots

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Fill in what the user left open (arg_groups/platform_hook.py:76).

        ``server_args`` reads the arguments resolved so far; what is assigned becomes a declared
        default. Runs in the launching process, before any worker is spawned.
        """
        from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase
        from sglang.srt.utils.common import get_cpu_ids_by_node

        # Declared for every CPU by handle_cpu_backends, and never usable here.
        if server_args.attention_backend == "intel_amx":
            server_args.attention_backend = self.get_default_attention_backend()
        backend, policy = server_args.attention_backend, server_args.kv_policy
        if server_args.speculative_algorithm and (backend, policy) == ("torch_native", "none"):
            raise ValueError(
                "--attention-backend torch_native has no mask for the drafts of "
                "--speculative-algorithm NGRAM; add a --kv-policy, whose attention has"
            )
        # Its kernels are for accelerators; its own layout goes with it (hicache_hook.py).
        if server_args.hicache_io_backend == "kernel":
            server_args.hicache_io_backend = "direct"
        graphs = server_args.cuda_graph_config
        for phase in Phase.ALL:
            graphs = with_phase(graphs, phase, backend=Backend.DISABLED)
        server_args.cuda_graph_config = graphs

        # The pool is host memory that others need too: do not take nearly all of it unasked.
        if server_args.max_total_tokens is None and server_args.mem_fraction_static is None:
            server_args.max_total_tokens = MAX_TOTAL_TOKENS
        # SGLang's default reserves 2048 rows of context_len int32 in the request table.
        if server_args.max_running_requests is None:
            server_args.max_running_requests = MAX_RUNNING_REQUESTS

        # SGLang's default runs on Triton.
        if server_args.lora_backend == "csgmv":
            server_args.lora_backend = "torch_native"

        # SGLang's default backs retracted requests up into pinned memory.
        backup = server_args.disaggregation_decode_retraction_backup
        if server_args.disaggregation_mode == "decode" and backup is None:
            server_args.disaggregation_decode_retraction_backup = "cpu_tensor"

        # An idle scheduler spins on a core, and here its cores are those of everybody else.
        server_args.sleep_on_idle = True

        ranks = server_args.tp_size * server_args.pp_size * server_args.dp_size
        if ranks > len(get_cpu_ids_by_node()):
            bind_ranks(ranks)
            # Each rank measures the memory of its whole NUMA node as its own.
            if server_args.mem_fraction_static is None:
                server_args.mem_fraction_static = round(SHARED_MEMORY_FRACTION / ranks, 3)


def disable_compilation() -> None:
    """Run ``@torch.compile`` functions as written, unless the user set TORCHDYNAMO_DISABLE.

    SGLang decorates small elementwise functions (rotary_embedding/utils.py:96); compiling them on
    a CPU costs 8-20 s in the first request, needs a C++ compiler, and gives nothing back.
    """
    if "TORCHDYNAMO_DISABLE" in os.environ:
        return
    # torch reads it when a function is decorated; spawned workers inherit it.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    config = sys.modules.get("torch._dynamo.config")
    if config is not None:
        config.disable = True  # type: ignore[attr-defined]


def make_pin_memory_a_no_op() -> None:
    """Let ``Tensor.pin_memory`` return the tensor: without an accelerator it can only raise.

    SGLang's video decoder pins every frame batch outside its own CPU engine
    (utils/video_decoder.py:192).
    """

    def pin_memory(self: torch.Tensor, device: Any = None) -> torch.Tensor:
        return self

    torch.Tensor.pin_memory = pin_memory  # type: ignore[method-assign, assignment]


def make_synchronize_a_no_op() -> None:
    """Let ``torch.cuda.synchronize`` return: without a GPU it can only raise, and nothing runs.

    It is what ``torch.get_device_module()`` has in a build for CUDA, whatever the machine; there
    ``/release_memory_occupation`` ends the scheduler (scheduler_components/weight_updater.py:379).
    """

    def synchronize(device: Any = None) -> None:
        return None

    torch.cuda.synchronize = synchronize


class PageableTorch(types.ModuleType):
    """The module `torch`, but for factories that leave out `pin_memory`."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        return pageable(found) if name in LORA_FACTORIES else found


def pageable(factory: Any) -> Any:
    """A factory of tensors that pins nothing: without an accelerator it could only raise."""

    @functools.wraps(factory)
    def make(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        made: torch.Tensor = factory(*args, **kwargs)
        return made

    return make


def let_adapters_be_pageable() -> None:
    """Show SGLang's modules of adapters another `torch`.

    Wrapping torch's own factories would hide them from `with torch.device(...)`, which knows them
    by identity (torch/utils/_device.py).
    """
    for name in LORA_MODULES:
        importlib.import_module(name).torch = PageableTorch("torch")  # type: ignore[attr-defined]


def let_page_lists_be_pageable() -> None:
    """A prefill server sends lists of pages from pageable memory, and no prefix before its prefill:
    SGLang pins them and records CUDA events (disaggregation/prefill.py, _send_kv_chunk and
    maybe_send_cached_prefix_chunk)."""
    from sglang.srt.runtime_context import get_disagg

    if get_disagg().disaggregation_mode != "prefill":
        return
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender

    MooncakeKVSender.supports_host_tensor_indices = False
    os.environ["SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX"] = "0"


def bind_ranks(ranks: int) -> None:
    """Deal the usable cores to ``ranks`` processes, unless the user has done so.

    SGLang asserts ranks <= NUMA nodes without SGLANG_CPU_OMP_THREADS_BIND
    (utils/numa_utils.py:463). Without OMP_NUM_THREADS every rank would start a thread per core.
    """
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // ranks)
    groups = [
        [cores[(rank * share + i) % len(cores)] for i in range(share)] for rank in range(ranks)
    ]
    os.environ.setdefault(
        "SGLANG_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, group)) for group in groups)
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
