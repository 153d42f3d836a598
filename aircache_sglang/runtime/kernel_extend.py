# SPDX-License-Identifier: Apache-2.0
"""Attention of several new tokens of a request whose picture is packed, by the Triton kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from aircache_kernels import extend_attention
from aircache_sglang.runtime.drafts import Drafts
from aircache_sglang.runtime.extend import ExtendJob
from aircache_sglang.runtime.table import PoolReader
from aircache_sglang.runtime.transfer import prefix_sums, to_device


class KernelExtender(PoolReader):
    """All requests of a prefill that extend a replica, or of a verify step, in one launch a layer.

    Their slots are found through the live row and the table, in which they have been entered.
    """

    _source: torch.Tensor | slice
    _tree: torch.Tensor | None

    def plan(self, jobs: Sequence[ExtendJob]) -> None:
        """Bring the layout of one prefill to the device."""
        device = self.table.req_to_token.device
        lengths = [job.end - job.start for job in jobs]
        batch_rows = [row for job in jobs for row in range(job.source.start, job.source.stop)]
        self._source = to_device(batch_rows, device, torch.int64)
        self._qo_indptr = prefix_sums(lengths, device)
        self._rows = to_device([job.record.row for job in jobs], device, torch.int64)
        self._seq_lens = to_device([job.end for job in jobs], device, torch.int64)
        self._most, self._tree = max(lengths), None

    def plan_drafts(self, drafts: Drafts) -> None:
        """Note what one verify step reads, all of it on the device."""
        batch, n, _ = drafts.tree.shape
        device = self.table.req_to_token.device
        self._source = slice(None)
        self._qo_indptr = torch.arange(batch + 1, dtype=torch.int32, device=device) * n
        self._rows, self._seq_lens = drafts.rows, drafts.seq_lens
        self._most, self._tree = n, drafts.tree

    def attend(self, q: torch.Tensor, out: torch.Tensor, layer: Any) -> None:
        """Overwrite the planned rows of one layer's output; q, out: [tokens, H_q, D]."""
        out[self._source] = extend_attention(
            q[self._source],
            self._qo_indptr,
            self.pool.k_all,
            self.pool.v_all,
            self.pool.plane(layer),
            self.table.tables,
            self._rows,
            self._seq_lens,
            max_qo_len=self._most,
            sm_scale=layer.scaling,
            tree=self._tree,
        )
