# SPDX-License-Identifier: Apache-2.0
"""Host integers on the device, without waiting for it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch


def to_device(values: Iterable[int], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A vector of `values`; pinned first, so that the copy does not wait."""
    host = torch.tensor(list(values), dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def vectors_to_device(vectors: Sequence[Sequence[int]], device: torch.device) -> list[torch.Tensor]:
    """int32 vectors in one transfer; each begins at 16 bytes, for which Triton compiles once."""
    padded = [(*vector, *[0] * (-len(vector) % 4)) for vector in vectors]
    together = to_device(itertools.chain.from_iterable(padded), device, torch.int32)
    parts = together.split([len(vector) for vector in padded])
    return [part[: len(vector)] for part, vector in zip(parts, vectors, strict=True)]


def indptr(lengths: Sequence[int]) -> list[int]:
    """[len + 1], FlashInfer's."""
    return list(itertools.accumulate(lengths, initial=0))


def prefix_sums(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """int32 [len + 1], `indptr` on the device."""
    return to_device(indptr(lengths), device, torch.int32)
