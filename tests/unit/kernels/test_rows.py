# SPDX-License-Identifier: Apache-2.0
"""`lay_out_rows` against its oracle: every entry of the tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aircache_kernels import Tables, lay_out_rows, reference
from tests.unit.kernels.cases import prefix


def case(device: torch.device, index_dtype: torch.dtype = torch.int64) -> list[Any]:
    """Three requests: one picture, text between pictures, and a picture longer than one block."""
    generator = torch.Generator().manual_seed(0)
    columns, between, visual = [4, 1, 300], [0, 5, 2], [30, 1, 2500]

    def slots(n: int) -> torch.Tensor:
        return torch.randint(1, 9999, (n,), generator=generator).to(index_dtype).to(device)

    return [
        Tables(
            torch.full((6, 2600), 77, dtype=torch.int32, device=device),
            torch.full((6,), -5, dtype=torch.int32, device=device),
            torch.zeros(6, dtype=torch.int32, device=device),
            torch.zeros((6, 3), dtype=torch.int32, device=device),
        ),
        torch.tensor([4, 1, 3], dtype=torch.int32, device=device),
        torch.tensor([9, 0, 61], dtype=torch.int32, device=device),
        prefix(visual, device),
        prefix(columns, device),
        slots(sum(columns)),
        prefix(between, device),
        slots(sum(between)),
    ]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_rows_and_table(index_dtype: torch.dtype, device: torch.device) -> None:
    arguments = case(device, index_dtype)
    want = reference.rows_reference(*arguments)
    lay_out_rows(*arguments)
    for got, expected in zip(arguments[0], want, strict=True):
        assert torch.equal(got, expected)
    assert (arguments[0].req_to_token[0] == 77).all(), "a row of no request was written"


def test_bad_arguments(device: torch.device) -> None:
    arguments = case(device)
    with pytest.raises(ValueError, match=r"starts must have shape \[3\], got \[2\]"):
        lay_out_rows(*arguments[:2], arguments[2][:2], *arguments[3:])
    with pytest.raises(ValueError, match=r"gap_len must have shape \[6\], got \[5\]"):
        lay_out_rows(arguments[0]._replace(gap_len=arguments[0].gap_len[:5]), *arguments[1:])
