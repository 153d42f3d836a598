# SPDX-License-Identifier: Apache-2.0
"""Whether a prompt and the pictures and videos beside it belong together.

Functions of a prompt alone; `media.py` knows where SGLang keeps what they are given. What does not
fit is a ValueError, which SGLang answers with HTTP 400.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

Prompt = str | list[int]


@dataclasses.dataclass(frozen=True, slots=True)
class Mark:
    """What stands for one picture, video or sound in the prompts of a model.

    kind: "picture", "video" or "sound".
    token: the token that a picture of n tokens fills n times; token_id: its id, None if unknown.
    native: what a prompt holds before it is expanded, `token` itself or with a token on each side.
    pattern: all that SGLang takes for one.
    """

    kind: str
    token: str
    token_id: int | None
    native: str
    pattern: re.Pattern[str]

    @property
    def is_wrapped(self) -> bool:
        """Whether there are tokens on each side, so that one run of `token` is one picture."""
        return self.native != self.token and self.token in self.native

    def written(self, prompt: Prompt) -> list[int]:
        """How often `token` is said, for each picture that the prompt speaks of, in order."""
        if isinstance(prompt, str):
            runs = [max(1, match.count(self.token)) for match in self._found(prompt)]
            return runs if self.is_wrapped else [1] * sum(runs)
        if self.token_id is None:
            return []
        runs = runs_of(prompt, self.token_id)
        return runs if self.is_wrapped else [1] * sum(runs)

    def _found(self, prompt: str) -> Iterator[str]:
        # The bare token last: SGLang's pattern may hold it, with what is on each side.
        either = re.compile(f"{self.pattern.pattern}|{re.escape(self.token)}", self.pattern.flags)
        return (match.group() for match in either.finditer(prompt))

    def normal(self, prompt: Prompt) -> Prompt:
        """The prompt with `native` for every picture; expanded runs are one token again."""
        if not self.is_wrapped:
            return prompt
        if isinstance(prompt, str):
            return self.pattern.sub(lambda _: self.native, prompt)
        return [
            token
            for token, run in itertools.groupby(prompt)
            for _ in (range(1) if token == self.token_id else run)
        ]


def runs_of(ids: Sequence[int], token_id: int) -> list[int]:
    """Lengths of the maximal runs of one id."""
    return [len(list(run)) for token, run in itertools.groupby(ids) if token == token_id]


def fit(
    prompt: Prompt, given: int, mark: Mark, *, may_add: bool = False
) -> tuple[Prompt, list[int]]:
    """The prompt as SGLang's processors can read it, and the runs that it must expand to.

    given: pictures (or videos) of the request; may_add: whether the model's processor itself writes
    the marks that are missing. No runs where the prompt is not expanded.
    """
    written = mark.written(prompt)
    if len(written) > given or (len(written) < given and not may_add):
        elsewhere = " and" if mark.token == mark.native else f", and {mark.token}"
        raise ValueError(
            f"the prompt speaks of {_count(len(written), mark.kind)} and the request brings "
            f"{given}; write {mark.native} once for each{elsewhere} nowhere else"
        )
    return mark.normal(prompt), written if any(run > 1 for run in written) else []


def check_runs(written: Sequence[int], ids: Sequence[int], mark: Mark) -> None:
    """An expanded prompt must be expanded as this server would; see `fit`."""
    if not written or mark.token_id is None:
        return
    for index, (found, right) in enumerate(
        zip(written, runs_of(ids, mark.token_id), strict=True), start=1
    ):
        if found != right:
            raise ValueError(
                f"the prompt holds {mark.token} {found} times for {mark.kind} {index}, which "
                f"fills {right}; write it once"
            )


def check_spans(offsets: Sequence[Sequence[int]] | None, length: int, kind: str) -> int:
    """Tokens that a picture fills. offsets: inclusive pairs; length: tokens of the prompt."""
    spans = [(int(start), int(end)) for start, end in offsets or ()]
    if not spans:
        raise ValueError(f"a {kind} of the request has no place in the prompt")
    for start, end in spans:
        if not 0 <= start <= end < length:
            raise ValueError(
                f"a {kind} fills tokens {start} to {end} of a prompt that has {length}; "
                "the offsets of its data are wrong"
            )
    return sum(end - start + 1 for start, end in spans)


def check_enclosed(offsets: Sequence[Sequence[int]], ids: Sequence[int], mark: Mark) -> None:
    """What SGLang has found between two tokens is a picture's, and nothing that a text says.

    offsets: inclusive pairs; a cut prompt `ids` has only the first of them.
    """
    for start, end in offsets:
        if start > end or any(token != mark.token_id for token in ids[start : end + 1]):
            raise ValueError(
                f"before a {mark.kind} the prompt says one of the tokens that stand around each "
                f"{mark.kind}; write {mark.native} once for each, and leave out the other tokens"
            )


def check_tensor(feature: Any, kind: str, what: str) -> None:
    """Data in place of a picture, which only a caller in Python can give: a torch.Tensor."""
    if not isinstance(feature, torch.Tensor) or not feature.is_floating_point():
        found = f"{feature.dtype}" if isinstance(feature, torch.Tensor) else type(feature).__name__
        raise ValueError(f"the {what} of a {kind} must be a floating-point tensor, got {found}")


def check_embedding(feature: Any, n_tokens: int, width: int, kind: str) -> None:
    """A precomputed embedding: a floating-point tensor [..., width] of n_tokens rows."""
    if feature.ndim < 2 or feature.shape[-1] != width:
        raise ValueError(
            f"the precomputed embedding of a {kind} has shape {tuple(feature.shape)}; this model "
            f"reads [tokens, {width}]"
        )
    rows = feature.numel() // width
    if rows != n_tokens:
        raise ValueError(
            f"the precomputed embedding of a {kind} has {rows} rows, and the prompt keeps "
            f"{n_tokens} tokens for it; write the prompt with one placeholder for each row"
        )


def check_grid(grid: Any, n_tokens: int, *, merge: int, kind: str) -> int:
    """Patches of a Qwen grid [pictures, (t, h, w)], merge x merge of which are one token."""
    grid = torch.as_tensor([] if grid is None else grid)
    if grid.ndim != 2 or grid.shape[-1] != 3:
        raise ValueError(
            f"the data of a {kind} has a grid of shape {tuple(grid.shape)}; this model reads "
            "[pictures, 3]"
        )
    rows = int(grid.prod(-1).sum())
    _check_fill(rows / merge**2, n_tokens, kind)
    return rows


def check_patches(feature: torch.Tensor, rows: int, width: int, kind: str) -> None:
    """What a Qwen processor puts out: patches [rows, width]."""
    if tuple(feature.shape) != (rows, width):
        raise ValueError(
            f"the processor output of a {kind} has shape {tuple(feature.shape)}; its grid and this "
            f"model need [{rows}, {width}]"
        )


def check_tiles(feature: Any, n_tokens: int, *, side: int, tokens: int, kind: str) -> None:
    """What InternVL's processor puts out: tiles [n, 3, side, side] of so many tokens each."""
    if feature.ndim != 4 or tuple(feature.shape[1:]) != (3, side, side):
        raise ValueError(
            f"the processor output of a {kind} has shape {tuple(feature.shape)}; this model reads "
            f"[tiles, 3, {side}, {side}]"
        )
    _check_fill(feature.shape[0] * tokens, n_tokens, kind)


def _check_fill(right: float, n_tokens: int, kind: str) -> None:
    if right != n_tokens:
        raise ValueError(
            f"the data of a {kind} fills {right:g} tokens, and the prompt keeps {n_tokens} for it; "
            "write the prompt with one placeholder for each"
        )


def _count(number: int, kind: str) -> str:
    return f"{number} {kind}" + ("" if number == 1 else "s")
