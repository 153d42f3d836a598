# SPDX-License-Identifier: Apache-2.0
"""The tables through which attention finds a request's keys."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Tables(NamedTuple):
    """What decode must know of R requests, on the device; all int32, keyed by `req_pool_idx`.

    req_to_token: [R, max_context], slots; last dimension contiguous.
    gap_start, gap_len: [R], the visual span of a compressed request; gap_len 0 is uncompressed.
        Its columns are the slots req_to_token[r, gap_start + c].
    cell_offset: [R, L + 1], prefix sums of the layer budgets.
    """

    req_to_token: Tensor
    gap_start: Tensor
    gap_len: Tensor
    cell_offset: Tensor
