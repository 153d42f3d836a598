# SPDX-License-Identifier: Apache-2.0
"""The argument checks that every policy function shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor


def number_in(name: str, value: object, low: float, high: float, *, open_low: bool) -> float:
    """`value` as a float between `low` and `high`; ValueError for bool, NaN and anything else."""
    bracket = "(" if open_low else "["
    wanted = f"{name} must be a number in {bracket}{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{wanted}, got {value!r}")
    number = float(value)
    if math.isnan(number) or number > high or number < low or (open_low and number == low):
        raise ValueError(f"{wanted}, got {value!r}")
    return number


def validate_alpha(alpha: object) -> float:
    """The relevance threshold of eq. 5 as a float in [0, 1]."""
    return number_in("alpha", alpha, 0.0, 1.0, open_low=False)


def validate_retention(retention: object) -> float:
    """The share of visual KV to keep as a float in (0, 1]."""
    return number_in("retention", retention, 0.0, 1.0, open_low=True)


def validate_scale(scale: object, head_dim: int) -> float:
    """The softmax scale: `head_dim ** -0.5` for None, else a finite number above 0."""
    if scale is None:
        return float(head_dim**-0.5)
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise ValueError(f"scale must be None or a number above 0, got {scale!r}")
    number = float(scale)
    if not math.isfinite(number) or number <= 0.0:
        raise ValueError(f"scale must be None or a number above 0, got {scale!r}")
    return number


def positive_int(name: str, value: object) -> int:
    """`value` as an int of at least 1; ValueError for bool and anything else."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return int(value)


def natural(name: str, value: object) -> int:
    """`value` as an int of at least 0; ValueError for bool and anything else."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 0:
        raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
    return int(value)


def one_of(name: str, value: object, known: Sequence[str]) -> str:
    """`value` if it is one of `known`; ValueError that lists them otherwise."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return value


def tensor_of(name: str, value: object, shape: Sequence[str | int]) -> Tensor:
    """A floating tensor of `shape`: an int is an exact size, a name any size of at least 1."""
    wanted = "[" + ", ".join(str(size) for size in shape) + "]"
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor of shape {wanted}, got {type(value).__name__}")
    fits = value.ndim == len(shape) and all(
        size >= 1 and (isinstance(want, str) or size == want)
        for size, want in zip(value.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} must have shape {wanted}, got {list(value.shape)}")
    if not value.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, got {value.dtype}")
    return value


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where an input is float64, otherwise float32 (half precision is widened)."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
