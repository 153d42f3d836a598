# SPDX-License-Identifier: Apache-2.0
"""The row of a compressed request in `req_to_token`: one gap where its visual tokens were.

    entries                in stock SGLang           once packed
    [0, start)             text                      the same
    [start, start + m)     pictures, and the         the m columns
    [start + m, gap_end)   text between them         the padding slot 0
    [gap_end, end)                                   the text between the pictures, moved up
    [end, ...)             instruction and answer    the same

So text is what stands outside the gap [start, gap_end), gap_end = start + N_v, and needs no table
of its own. `lay_out_rows` of aircache_kernels writes the same.
"""

from __future__ import annotations

import torch

from aircache_sglang.runtime.spans import VisualPrompt


def gap_end(prompt: VisualPrompt) -> int:
    """One past the gap of a packed row."""
    return prompt.start + prompt.n_visual


def gap_entries(prompt: VisualPrompt, columns: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
    """A packed row's entries from `start` on.

    columns: integers [m] slots; behind: of the text that follows the gap, as much as is wanted.
    """
    padding = columns.new_zeros(prompt.n_visual - len(columns))
    return torch.cat([columns, padding, behind])


def text_positions(prompt: VisualPrompt, length: int, device: torch.device) -> torch.Tensor:
    """Positions outside the gap of a packed row of `length` entries, int64."""
    head = torch.arange(prompt.start, device=device)
    return torch.cat([head, torch.arange(gap_end(prompt), length, device=device)])
