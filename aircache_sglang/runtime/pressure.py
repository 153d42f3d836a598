# SPDX-License-Identifier: Apache-2.0
"""Which request gives up slots next, and how many there are to be had; from host knowledge alone.

The same on every tensor-parallel rank: it follows from the order in which requests came and from
counts of slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Iterator, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A request that could be packed, or requests that hold one picture and could be together.

    keys: which ones. rung: the next of their ladder. columns: of that rung and of all below it.
    held: slots that they give up for them: those of pictures that nobody else holds, or columns.
    is_whole: the pictures are whole, and the columns are other slots than those.
    """

    keys: tuple[int, ...]
    rung: int
    columns: tuple[int, ...]
    held: int
    is_whole: bool

    def gain(self, step: int) -> int:
        """Slots won by packing it `step` rungs below the next one."""
        return self.held - self.columns[step]

    def fits(self, step: int, free: int) -> bool:
        """Whether there is room for its columns while its picture is still there."""
        return not self.is_whole or self.columns[step] <= free


@dataclasses.dataclass(frozen=True, slots=True)
class Whole:
    """A request whose pictures are whole.

    columns: of its rungs. parts: of its pictures, the slots of each and all that hold it.
    """

    key: int
    columns: tuple[int, ...]
    parts: dict[Hashable, tuple[int, int]]


def together(requests: Sequence[Whole]) -> Iterator[Candidate]:
    """Candidates of rung 0: who shares a part with another can win it with that one alone.

    A part that somebody else holds too, who is not among `requests`, is won by nobody.
    """
    holders: dict[Hashable, list[int]] = {}
    for place, request in enumerate(requests):
        for part in request.parts:
            holders.setdefault(part, []).append(place)
    leader = list(range(len(requests)))

    def lead(place: int) -> int:
        while leader[place] != place:
            place = leader[place]
        return place

    held = [0] * len(requests)
    won: list[tuple[int, int]] = []
    for part, places in holders.items():
        size, n_holders = requests[places[0]].parts[part]
        if len(places) == n_holders:
            won.append((places[0], size))
            for place in places[1:]:
                first, second = sorted((lead(places[0]), lead(place)))
                leader[second] = first
    for place, size in won:
        held[lead(place)] += size
    groups: dict[int, list[Whole]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(lead(place), []).append(request)
    for place, members in groups.items():
        n_rungs = max(len(member.columns) for member in members)
        columns = tuple(
            sum(member.columns[min(rung, len(member.columns) - 1)] for member in members)
            for rung in range(n_rungs)
        )
        yield Candidate(tuple(m.key for m in members), 0, columns, held[place], True)


def next_to_pack(candidates: Iterable[Candidate], free: int) -> tuple[Candidate, int] | None:
    """(candidate, rung) that loses the least for each slot it wins, None if nothing can be won.

    All go to one rung before any goes to the next, and among these the one with the most slots to
    win is first, then the one that came first. Where the columns of no candidate's next rung fit
    `free` slots, one goes deeper at once.
    """
    best: tuple[tuple[int, int, int], Candidate] | None = None
    for candidate in candidates:
        for step in range(len(candidate.columns)):
            if candidate.gain(step) > 0 and candidate.fits(step, free):
                # Deeper at once, behind all that need not; then by rung; then by what is won.
                order = (step, candidate.rung, -candidate.gain(step))
                if best is None or order < best[0]:
                    best = (order, candidate)
                break
    if best is None:
        return None
    (step, rung, _), candidate = best
    return candidate, rung + step


def packable(candidates: Sequence[Candidate], free: int) -> int:
    """Slots that are won once all have gone as far down as they can, with `free` to begin with.

    Going rung by rung ends with no fewer: what keeps one from its last rung is that its columns do
    not fit, and here they do not fit either.
    """
    won = 0
    for candidate in sorted(candidates, key=lambda c: (c.is_whole, c.columns[-1])):
        last = len(candidate.columns) - 1
        if candidate.gain(last) > 0 and candidate.fits(last, free + won):
            won += candidate.gain(last)
    return won
