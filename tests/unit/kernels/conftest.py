# SPDX-License-Identifier: Apache-2.0
"""Without a GPU the kernels run in Triton's interpreter, chosen before triton is first imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(
            "triton was imported before tests/unit/kernels could choose its interpreter: set "
            "TRITON_INTERPRET=1 or run tests/unit/kernels in a pytest invocation of its own"
        )
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """NaN, or the largest integer, in all that `torch.empty` gives, outputs and scratch alike."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
