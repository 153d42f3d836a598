# SPDX-License-Identifier: Apache-2.0
"""When the plain-CPU platform takes a machine. SGLang asks once: each case is a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

RESOLVE = """
import json, os, sys
import torch
{before}
from sglang.srt.platforms import current_platform
print(json.dumps({{
    "class": type(current_platform).__name__,
    "dynamo": os.environ.get("TORCHDYNAMO_DISABLE"),
    {report}
}}))
"""


def resolve(before: str = "", report: str = "", **env: str) -> Any:
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SGLANG_") and name != "TORCHDYNAMO_DISABLE"
    }
    result = subprocess.run(
        [sys.executable, "-c", RESOLVE.format(before=before, report=report)],
        env=clean | {"CUDA_VISIBLE_DEVICES": ""} | env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if result.returncode:
        return result.stderr
    return json.loads(result.stdout.splitlines()[-1])


# These mislead SGLang too: only activate()'s answer counts.
ACCELERATOR = "torch.accelerator.is_available = lambda: True"
XPU = "torch.xpu.is_available = lambda: True"
ARM = "import platform; platform.machine = lambda: 'aarch64'"
OTHER_PLUGIN = """
import importlib.metadata as m
found = m.entry_points
def entry_points(**kw):
    eps = found(**kw)
    if kw.get("group") != "sglang.srt.platforms":
        return eps
    other = m.EntryPoint("vendor", "builtins:print", "sglang.srt.platforms")
    return m.EntryPoints([*eps, other])
m.entry_points = entry_points
import aircache_sglang.platform
"""


def test_a_bare_machine_gets_the_platform() -> None:
    found = resolve(
        report="""
        "oot": current_platform.is_out_of_tree(),
        "cpu": current_platform.is_cpu(),
        "key": current_platform.get_dispatch_key_name(),
        "pinned": torch.ones(3).pin_memory().tolist(),
        """
    )
    assert found == {
        "class": "PlainCpuPlatform",
        "dynamo": "1",
        "oot": True,
        "cpu": False,
        "key": "native",
        "pinned": [1.0, 1.0, 1.0],
    }


def test_the_platform_can_be_named() -> None:
    assert resolve(SGLANG_PLATFORM="aircache_cpu")["class"] == "PlainCpuPlatform"


@pytest.mark.parametrize("before", [ACCELERATOR, XPU, ARM], ids=["accelerator", "xpu", "arm64"])
def test_other_machines_are_left_alone(before: str) -> None:
    answer = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import torch\n{before}\nfrom aircache_sglang.platform import activate\n"
            "print(activate())",
        ],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "SGLANG_PLATFORM": "aircache_cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert answer.stdout.strip() == "None"


def test_sglangs_own_cpu_engine_wins() -> None:
    assert resolve(SGLANG_USE_CPU_ENGINE="1") == {"class": "CpuSRTPlatform", "dynamo": None}


def test_it_waits_to_be_named_beside_another_plugin() -> None:
    # print() returns None, as a vendor's plugin does without its hardware.
    assert resolve(before=OTHER_PLUGIN)["class"] == "SRTPlatform"
    named = resolve(before=OTHER_PLUGIN, SGLANG_PLATFORM="aircache_cpu")
    assert named["class"] == "PlainCpuPlatform"


def test_another_selected_platform_never_loads_it() -> None:
    assert "not found in discovered platform plugins" in resolve(SGLANG_PLATFORM="vendor")


def test_a_users_dynamo_setting_stays() -> None:
    assert resolve(TORCHDYNAMO_DISABLE="0")["dynamo"] == "0"


def test_activation_imports_neither_sglang_nor_torch() -> None:
    code = (
        "import sys, aircache_sglang.platform\n"
        "print([name for name in ('torch', 'sglang') if name in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert answer.stdout.strip() == "[]"
