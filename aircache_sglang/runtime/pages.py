# SPDX-License-Identifier: Apache-2.0
"""Pages of the KV pool: a slot is given back, shared and found with its whole page.

Positions [k P, (k + 1) P) of a request stand in the slots of one page, in order
(mem_cache/allocator/paged.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def page_floor(n: int, page_size: int) -> int:
    """The last page boundary at or before position n; tokens of whole pages among n."""
    return n // page_size * page_size


def page_ceil(n: int, page_size: int) -> int:
    """The first page boundary at or behind position n; slots of the pages that hold n tokens."""
    return -(-n // page_size) * page_size


def whole_pages(spans: Iterable[tuple[int, int]], page_size: int) -> tuple[tuple[int, int], ...]:
    """The whole pages within half-open spans; nothing of a span that fills none."""
    inner = ((page_ceil(a, page_size), page_floor(b, page_size)) for a, b in spans)
    return tuple((a, b) for a, b in inner if a < b)


def without(start: int, end: int, holes: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The parts of [start, end) outside ascending, disjoint half-open holes."""
    for a, b in holes:
        if start < min(a, end):
            yield start, min(a, end)
        start = max(start, b)
    if start < end:
        yield start, end
