# SPDX-License-Identifier: Apache-2.0
"""Resolve command lines as SGLang would on a GPU that is not there.

python -m tests.support.mocked_gpu DEVICE GROUPS.json, where the file holds a list of
{"plugin": whether SGLang loads its plugins, "argv": [flags, ...]}; prints a line of JSON for each
command line. Mocked, before SGLang is imported:
- what torch.cuda says of the device: that there are eight, name, compute capability, memory;
- `sgl_kernel`, compiled kernels that load with a driver alone: an empty module, none of which is
  called while arguments are resolved.
All else is SGLang's own: platform, probes, models' configurations, resolution. Each group has a
fork of its own, since hooks stay in a process.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import logging
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

# Name, compute capability, memory in MiB as nvidia-smi gives it, multiprocessors.
DEVICES = {
    "H100": ("NVIDIA H100 80GB HBM3", (9, 0), 81559, 132),
    "B200": ("NVIDIA B200", (10, 0), 183359, 148),
    "RTX 5090": ("NVIDIA GeForce RTX 5090", (12, 0), 32607, 170),
}


class _NoKernels(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `sgl_kernel` and its submodules, with whatever is asked of them."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname.split(".")[0] == "sgl_kernel":
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        return mock.MagicMock(name=spec.name, __path__=[], __spec__=spec)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def mock_device(device: str) -> None:
    import torch

    name, capability, mebibytes, multiprocessors = DEVICES[device]
    memory = mebibytes << 20
    properties = SimpleNamespace(
        name=name,
        major=capability[0],
        minor=capability[1],
        total_memory=memory,
        multi_processor_count=multiprocessors,
    )
    answers = {
        "is_available": True,
        # Else SGLang asks NVML, which knows the real devices of this machine.
        "is_initialized": True,
        "device_count": 8,
        "current_device": 0,
        "get_device_name": name,
        "get_device_capability": capability,
        "get_device_properties": properties,
        "mem_get_info": (memory, memory),
    }
    for function, answer in answers.items():
        setattr(torch.cuda, function, lambda device=None, answer=answer: answer)
    # SGLang asks nvidia-smi first.
    os.environ["PATH"] = ""
    sys.meta_path.insert(0, _NoKernels())


def describe(args: Any) -> dict[str, Any]:
    """The arguments that matter here as they are, and all of SGLang's own as text."""
    import dataclasses

    from sglang.srt.arg_groups.arg_utils import field_names
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.server_args import ServerArgs

    view = resolving_view(args)
    names = sorted(name for name in field_names(ServerArgs) if not name.startswith("aircache_"))
    return {
        "attention_backend": view.attention_backend,
        "decode_attention_backend": view.decode_attention_backend,
        "page_size": view.page_size,
        "chunked_prefill_size": view.chunked_prefill_size,
        "mem_fraction_static": view.mem_fraction_static,
        "radix_cache_backend": view.radix_cache_backend,
        "decode": dataclasses.asdict(view.cuda_graph_config.decode),
        "all": {name: repr(getattr(view, name)) for name in names if name != "kv_policy"},
    }


def run(group: dict[str, Any]) -> None:
    """Print what becomes of each command line of a group."""
    from tests.support.refusals import outcome

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("aircache_patches").addHandler(handler)
    if group["plugin"]:
        from sglang.srt.plugins import load_plugins

        load_plugins()
    environment = dict(os.environ)
    for argv in group["argv"]:
        result = outcome(argv, describe)
        print(json.dumps(result | {"log": messages}), flush=True)
        messages.clear()
        os.environ.clear()
        os.environ.update(environment)


def main(device: str, path: str) -> None:
    mock_device(device)
    # What a resolution imports, once for all forks.
    import sglang.srt.arg_groups.pipeline
    import sglang.srt.configs.model_config
    import sglang.srt.entrypoints.engine  # noqa: F401

    for group in json.loads(Path(path).read_text()):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            run(group)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit(f"a group ended with status {status}")


if __name__ == "__main__":
    main(*sys.argv[1:])
