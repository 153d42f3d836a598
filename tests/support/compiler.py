# SPDX-License-Identifier: Apache-2.0
"""What tests of n-gram speculation need: SGLang compiles its corpus at the first use."""

from __future__ import annotations

import shutil

import pytest

HAS_COMPILER = shutil.which("c++") is not None and shutil.which("ninja") is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler and ninja")
