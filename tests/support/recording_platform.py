# SPDX-License-Identifier: Apache-2.0
"""A platform plugin: the plain CPU, with decode graphs that are recorded.

SGLang's own `DecodeCudaGraphRunner` captures and replays them, on recorded_graphs.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from aircache_sglang.platform.cpu import PlainCpuPlatform

# SGLang is being imported while this is: what needs it is imported where it is used.

SIZES = (1, 2, 4)


def activate() -> str:
    return f"{__name__}:RecordingPlatform"


class RecordingPlatform(PlainCpuPlatform):
    """The plain CPU with decode graphs."""

    capabilities = type(PlainCpuPlatform.capabilities)(graph_capture=True)

    def __init__(self) -> None:
        super().__init__()
        # What torch.cuda has and torch.cpu has not; no stream of a CPU is ever captured.
        torch.cpu.is_current_stream_capturing = lambda: False  # type: ignore[attr-defined]

    def apply_server_args_defaults(self, server_args: Any) -> None:
        from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

        super().apply_server_args_defaults(server_args)
        server_args.cuda_graph_config = with_phase(
            server_args.cuda_graph_config,
            Phase.DECODE,
            backend=Backend.FULL,
            bs=list(SIZES),
            max_bs=max(SIZES),
        )

    def init_backend(self) -> None:
        """Let SGLang capture on a CPU, which it does where torch.compile is asked for alone, and
        replay what a GPU replays, verify steps too.

        Besides, `torch.get_device_module()` is torch.cuda in a build for CUDA, and has no stream.
        """
        from sglang.srt.distributed import parallel_state
        from sglang.srt.model_executor.forward_batch_info import ForwardMode
        from sglang.srt.model_executor.model_runner_components import cuda_graph_setup

        compiling = SimpleNamespace(capture=SimpleNamespace(enable_torch_compile=True))
        cuda_graph_setup.get_flags = lambda: compiling
        ForwardMode.is_cpu_graph = ForwardMode.is_cuda_graph
        parallel_state.get_current_device_stream_fast = torch.cpu.current_stream

    def get_graph_runner_cls(self) -> type:
        from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner

        return DecodeCudaGraphRunner

    def get_full_graph_backend_cls(self) -> type:
        from tests.support.recorded_graphs import RecordingBackend

        return RecordingBackend
