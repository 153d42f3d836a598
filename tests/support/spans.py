# SPDX-License-Identifier: Apache-2.0
"""What the tests expect of a prompt's spans, counted out."""

from __future__ import annotations

import torch

from aircache_sglang.runtime.spans import VisualPrompt


def between_positions(prompt: VisualPrompt) -> torch.Tensor:
    """int64 [n_between], ascending: text positions in [start, end)."""
    visual = {position for span in prompt.spans for position in range(*span)}
    between = [p for p in range(prompt.start, prompt.end) if p not in visual]
    return torch.tensor(between, dtype=torch.int64)
