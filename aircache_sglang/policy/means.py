# SPDX-License-Identifier: Apache-2.0
"""Means that any dtype may have in any engine.

Engines that answer alike in every batch replace `aten::mean` and `aten::bmm` by kernels of their
own, which take no float64 and multiply float32 as TF32 (SGLang: batch_invariant_ops.py).
"""

from __future__ import annotations

from torch import Tensor


def mean(x: Tensor, dim: int, *, keepdim: bool = False) -> Tensor:
    """`x.mean(dim)` as a sum over a count; dtype of x, which is floating. No host sync."""
    return x.sum(dim=dim, keepdim=keepdim) / x.shape[dim]
