# SPDX-License-Identifier: Apache-2.0
"""What SGLang's batch-invariant mode makes of torch on a GPU, on the CPU.

`--enable-deterministic-inference` replaces these operators in the whole process
(batch_invariant_ops.py): none takes float64, and products of float32 are TF32's.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

ACCEPTED = (torch.float16, torch.bfloat16, torch.float32)


def mean(x: Tensor, dim: Sequence[int], keepdim: bool = False, dtype: None = None) -> Tensor:
    assert dtype is None and x.dtype in ACCEPTED, f"unsupported dtype: {x.dtype}"
    assert len(dim) > 0, "the mean of all elements would be their sum"
    total = x.sum(dim=dim, keepdim=keepdim, dtype=torch.float32)
    result = total / math.prod(x.shape[d] for d in dim)
    return result.to(x.dtype) if len(dim) == 1 else result


def bmm(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype not in ACCEPTED:
        raise ValueError(f"Unsupported dtype {a.dtype} for bmm_batch_invariant.")
    a_, b_ = (as_tf32(x) if x.dtype == torch.float32 else x.float() for x in (a, b))
    return (a_[:, :, :, None] * b_[:, None]).sum(2).to(a.dtype)


def as_tf32(x: Tensor) -> Tensor:
    """float32 with 10 bits of mantissa, rounded to nearest."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def mm(a: Tensor, b: Tensor) -> Tensor:
    return bmm(a[None], b[None])[0]


@contextlib.contextmanager
def batch_invariant() -> Iterator[None]:
    """Replace the operators on the CPU until the end of the block."""
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that kernels are overridden
            for name, function in (("mean.dim", mean), ("bmm", bmm), ("mm", mm)):
                library.impl(name, function, "CPU")
        yield
    finally:
        library._destroy()
