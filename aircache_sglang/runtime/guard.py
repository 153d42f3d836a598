# SPDX-License-Identifier: Apache-2.0
"""`--aircache-guard`: the server's default retention, moved by what shadows have found.

Evidence counts for the rung that it was gathered at, and only while the server stands there. A
window has WINDOW compared answers and is looked at after every LOOK of them.

Up: at a look the share of tokens that differ is above the bound, one-sided, with 95 % confidence
over all looks of a window together (Bonferroni).

Down: what is known of the lower rung is old. So going down is a trial, which the next window judges
as any other. It is made after `patience` windows in a row whose upper bound, one-sided 95 %, is
below the bound; the patience of each rung begins at 1 and doubles with each trial of it that ends
in a rise, up to MOST_PATIENCE: of the windows, at most one in patience + 1 is spent at a rung that
was found bad. At retention 1 nothing is compressed or compared: there WINDOW sampled requests are a
window, which they fill faster than comparisons do on a busy server.
"""

from __future__ import annotations

from statistics import NormalDist

from aircache_sglang.runtime.agreement import Comparison, Tally

RUNGS = (0.1, 0.2, 0.5, 1.0)
LOOK = 50
WINDOW = 200
MOST_PATIENCE = 32
_UP = NormalDist().inv_cdf(1 - 0.05 * LOOK / WINDOW)
_DOWN = NormalDist().inv_cdf(0.95)


class Guard:
    """The rungs of one server: its own retention, and those of RUNGS above it.

    bound: of the share of tokens that differ. retention: in force. raised, lowered: moves so far.
    """

    def __init__(self, bound: float, retention: float) -> None:
        self.bound = bound
        self._rungs = (retention, *(rung for rung in RUNGS if rung > retention))
        self._at = 0
        self._window = Tally()
        self._clean = 0
        self._patience = [1] * len(self._rungs)  # before a rung is tried
        self._on_trial = False
        self._unseen = 0
        self.raised = self.lowered = 0

    @property
    def retention(self) -> float:
        return self._rungs[self._at]

    def compared(self, one: Comparison) -> str | None:
        """An answer at the retention in force was compared; `raised`, `lowered` or None."""
        self._window.add(one)
        if self._window.requests % LOOK:
            return None
        _, low, _ = self._window.differing(_UP)
        if low > self.bound and self._at + 1 < len(self._rungs):
            if self._on_trial:
                self._patience[self._at] = min(2 * self._patience[self._at], MOST_PATIENCE)
            self.raised += 1
            return self._move(+1, on_trial=False)
        if self._window.requests < WINDOW:
            return None
        _, _, high = self._window.differing(_DOWN)
        self._window = Tally()
        if high >= self.bound:
            self._clean = 0
            return None
        return self._clean_window()

    def left_whole(self) -> str | None:
        """A sampled request was left alone since the retention in force is 1; as `compared`."""
        self._unseen += 1
        if self._unseen < WINDOW:
            return None
        self._unseen = 0
        return self._clean_window()

    def _clean_window(self) -> str | None:
        if self._on_trial:
            # It has held: what follows is judged anew.
            self._on_trial, self._patience[self._at] = False, 1
        self._clean += 1
        if self._at == 0 or self._clean < self._patience[self._at - 1]:
            return None
        self.lowered += 1
        return self._move(-1, on_trial=True)

    def _move(self, step: int, *, on_trial: bool) -> str:
        self._at += step
        self._window, self._clean, self._unseen = Tally(), 0, 0
        self._on_trial = on_trial
        return "raised" if step > 0 else "lowered"
