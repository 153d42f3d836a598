# SPDX-License-Identifier: Apache-2.0
"""The tests of tests/unit/kernels again, on compiled kernels: `device` is the GPU here."""

from __future__ import annotations

import importlib

import pytest

# hypothesis tests take no fixture, so that the skip has to come from here
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("device")]

MODULES = (
    "backend",
    "budgets",
    "decode",
    "engine_twins",
    "extend",
    "flashinfer_tables",
    "packing",
    "rows",
    "scoring",
    "selection",
    "threshold",
    "warm_up",
)

for _module in MODULES:
    _tests = vars(importlib.import_module(f"tests.unit.kernels.test_{_module}"))
    for _name, _test in _tests.items():
        if _name.startswith("test_") and callable(_test):
            # the file's name too: several files have a test of the same name
            globals()[f"test_{_module}_{_name.removeprefix('test_')}"] = _test
