# SPDX-License-Identifier: Apache-2.0
"""Rendered pages, questions about them, and the small model that reads them."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
