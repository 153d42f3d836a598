# SPDX-License-Identifier: Apache-2.0
"""The tests of tests/unit/kernels again, on compiled kernels: `device` is the GPU here."""

from __future__ import annotations

import pytest

from tests.unit.kernels import (
    test_budgets,
    test_decode,
    test_extend,
    test_flashinfer_tables,
    test_packing,
    test_scoring,
    test_selection,
)

# hypothesis tests take no fixture, so that the skip has to come from here
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("device")]

for _module in (
    test_budgets,
    test_decode,
    test_extend,
    test_flashinfer_tables,
    test_packing,
    test_scoring,
    test_selection,
):
    # prefixed by their file: several files have a test of the same name
    _prefix = _module.__name__.rpartition(".")[2]
    for _name, _test in list(vars(_module).items()):
        if _name.startswith("test_") and callable(_test):
            globals()[f"{_prefix}_{_name.removeprefix('test_')}"] = _test

# the modules themselves are no tests
del (
    test_budgets,
    test_decode,
    test_extend,
    test_flashinfer_tables,
    test_packing,
    test_scoring,
    test_selection,
)
