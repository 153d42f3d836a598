# SPDX-License-Identifier: Apache-2.0
"""Real-GPU runs: torch and triton are enough, SGLang need not be installed."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.fail("TRITON_INTERPRET=1 is set: these tests are about compiled kernels")
    return torch.device("cuda", torch.cuda.current_device())
