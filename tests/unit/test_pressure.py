# SPDX-License-Identifier: Apache-2.0
"""Whom to pack when slots are short, and what there is to be had."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from aircache_sglang.runtime.pressure import (
    Candidate,
    Whole,
    next_to_pack,
    packable,
    together,
)


def whole(key: int, held: int, *columns: int) -> Candidate:
    return Candidate((key,), 0, columns, held, True)


def test_all_go_to_one_rung_before_any_goes_to_the_next() -> None:
    at_first = Candidate((1,), 1, (25, 10), 50, False)
    small, large = whole(2, 40, 20, 10, 4), whole(3, 200, 100, 50, 20)
    assert next_to_pack([at_first, small, large], 1000) == (large, 0)
    assert next_to_pack([at_first, small], 1000) == (small, 0)
    assert next_to_pack([at_first], 0) == (at_first, 1)


def test_who_came_first_goes_first() -> None:
    one, other = whole(1, 100, 50), whole(2, 100, 50)
    assert next_to_pack([one, other], 50) == (one, 0)


def test_deeper_at_once_where_the_columns_do_not_fit() -> None:
    one, other = whole(1, 100, 50, 10), whole(2, 60, 30, 6)
    assert next_to_pack([one, other], 49) == (other, 0)
    assert next_to_pack([one, other], 29) == (one, 1)
    assert next_to_pack([one, other], 9) == (other, 1)
    assert next_to_pack([one, other], 5) is None


def test_nothing_is_packed_in_vain() -> None:
    assert next_to_pack([whole(1, 50, 50), whole(2, 0, 5)], 1000) is None
    assert next_to_pack([whole(1, 50, 50, 10)], 1000) == (whole(1, 50, 50, 10), 1)


def test_who_holds_one_picture_goes_together_or_not_at_all() -> None:
    requests = [
        Whole(1, (10, 2), {"a": (100, 2)}),
        Whole(2, (12, 3), {"a": (100, 2), "b": (20, 1)}),
        Whole(3, (9,), {"c": (90, 2)}),  # which somebody else holds too
        Whole(4, (8,), {"d": (80, 1)}),
    ]
    found = list(together(requests))
    assert found == [
        Candidate((1, 2), 0, (22, 5), 120, True),
        Candidate((3,), 0, (9,), 0, True),
        Candidate((4,), 0, (8,), 80, True),
    ]
    assert next_to_pack(found, 1000) == (found[0], 0)
    assert next_to_pack(found, 21) == (found[2], 0)
    assert packable(found, 1000) == 120 - 5 + 80 - 8


@dataclasses.dataclass
class Request:
    """What becomes of one request: slots of its picture, columns of its rungs, where it is."""

    picture: int
    columns: tuple[int, ...]
    rung: int | None = None

    def candidate(self, key: int) -> Candidate | None:
        if self.rung is None:
            return whole(key, self.picture, *self.columns)
        below = self.columns[self.rung + 1 :]
        held = self.columns[self.rung]
        return Candidate((key,), self.rung + 1, below, held, False) if below else None


@st.composite
def requests(draw: st.DrawFn) -> list[Request]:
    found = []
    for _ in range(draw(st.integers(1, 8))):
        picture = draw(st.integers(2, 200))
        sizes = draw(st.sets(st.integers(1, picture), min_size=1, max_size=4))
        rung = draw(st.sampled_from([None, None, 0]))
        found.append(Request(picture, tuple(sorted(sizes, reverse=True)), rung))
    return found


@given(requests(), st.integers(0, 300))
def test_going_down_rung_by_rung_wins_what_was_promised(found: list[Request], free: int) -> None:
    """Every step has room for its columns, and the last leaves no fewer slots than promised."""

    def candidates() -> list[Candidate]:
        listed = [request.candidate(key) for key, request in enumerate(found)]
        return [candidate for candidate in listed if candidate is not None]

    promised = free + packable(candidates(), free)
    steps = 0
    while (chosen := next_to_pack(candidates(), free)) is not None:
        candidate, rung = chosen
        request = found[candidate.keys[0]]
        before = request.picture if request.rung is None else request.columns[request.rung]
        if request.rung is None:
            assert request.columns[rung] <= free, "no room for the columns beside the picture"
        assert rung > (-1 if request.rung is None else request.rung)
        assert before > request.columns[rung]
        free += before - request.columns[rung]
        request.rung = rung
        steps += 1
        assert steps < 100
    assert free >= promised
