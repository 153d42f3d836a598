# SPDX-License-Identifier: Apache-2.0
"""The metrics against pairs worked out by hand, or published with them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.quality import metrics

WEIGHTS = st.lists(st.floats(0.01, 1e6), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("dallas", ["Dallas"], 1.0),
        ("Dallas  Texas ", ["dallas texas"], 1.0),
        ("dalas", ["dallas"], 1 - 1 / 6),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("abcd", ["abxy"], 0.5),
        ("abc", ["axyz"], 0.0),  # similarity 0.25
        ("mar 1998", ["march 1998", "mar. 1998"], 1 - 1 / 9),
        ("", ["dallas"], 0.0),
        ("", [""], 1.0),
    ],
)
def test_anls(prediction: str, answers: list[str], score: float) -> None:
    assert metrics.anls(prediction, answers) == pytest.approx(score)


@given(one=st.text("abc ", max_size=7), other=st.text("abc ", max_size=7))
def test_edit_distance_is_the_recursion(one: str, other: str) -> None:
    def distance(i: int, j: int) -> int:
        if min(i, j) < 0:
            return max(i, j) + 1
        change = distance(i - 1, j - 1) + (one[i] != other[j])
        if one[i] == other[j]:
            return change
        return min(change, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    if len(one) + len(other) <= 8:
        assert metrics.edit_distance(one, other) == distance(len(one) - 1, len(other) - 1)
    assert metrics.edit_distance(one, other) == metrics.edit_distance(other, one)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("14", "14", 1),
        ("14.7", "14", 1),
        ("14.71", "14", 0),
        ("13.3", "14", 1),
        ("13.29", "14", 0),
        ("-14", "14", 0),
        ("62%", "0.62", 1),
        ("62", "62%", 0),
        ("0", "0", 1),
        ("0.0", "0", 0),  # as published: nothing is within 5 % of 0
        ("yes", "Yes", 1),
        ("Yes.", "Yes", 0),
        ("nan", "14", 0),
        ("inf", "inf", 1),
        ("2,014", "2014", 0),
    ],
)
def test_relaxed_accuracy(prediction: str, answer: str, score: int) -> None:
    assert metrics.relaxed_accuracy(prediction, [answer]) == score


@pytest.mark.parametrize(
    ("prediction", "agree", "score"),
    [
        ("dakota", 10, 1.0),
        ("Dakota.", 4, 1.0),
        ("the dakota", 3, 0.9),
        ("dakota", 1, 0.3),
        ("x", 9, 0.0),
    ],
)
def test_vqa_accuracy(prediction: str, agree: int, score: float) -> None:
    """Of ten answers n agree: leaving one out, n - 1 or n thirds of an answer, at most 1."""
    answers = ["dakota"] * agree + [f"other {i}" for i in range(10 - agree)]
    assert metrics.vqa_accuracy(prediction, answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("two", "2", True),
        ("1,000", "1000", True),
        ("an apple", "Apple!", True),
        ("3.5", "35", False),
    ],
)
def test_vqa_accuracy_compares_forms(one: str, other: str, same: bool) -> None:
    assert (metrics.vqa_accuracy(one, [other] * 10) == 1.0) is same


def test_exact_match() -> None:
    assert metrics.exact_match(" K4-71\n", ["k4-71"]) == 1
    assert metrics.exact_match("K4-7", ["K4-71"]) == 0


@pytest.mark.parametrize(
    ("prediction", "score"),
    [("Yes", 1), ("yes, it is", 1), (" Yes.", 1), ("No", 0), ("It is yes", 0), ("", 0)],
)
def test_yes_no(prediction: str, score: int) -> None:
    assert metrics.yes_no(prediction, ["Yes"]) == score


@pytest.mark.parametrize(
    ("prediction", "chosen"),
    [
        ("B", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("B. a dog", "B"),
        ("The answer is B", "B"),
        ("Answer: B\nbecause", "B"),
        ("a dog", "B"),
        ("It shows a dog.", "B"),
        ("A dog", "B"),
        ("a cat and a dog", None),
        ("catalogue", None),
        ("E", None),
        ("neither", None),
        ("", None),
    ],
)
def test_choice(prediction: str, chosen: str | None) -> None:
    assert metrics.choice(prediction, {"A": "a cat", "B": "a dog", "C": "cat"}) == chosen


def test_mme_score() -> None:
    """One task: 3 of 4 right, one picture of two wholly right; another: all right."""
    scores = {"count": {"a": [1.0, 1.0], "b": [1.0, 0.0]}, "color": {"a": [1.0, 1.0]}}
    assert metrics.mme_score(scores) == pytest.approx(75 + 50 + 200)


def test_jensen_shannon_known() -> None:
    assert metrics.jensen_shannon([1, 0], [0, 1]) == pytest.approx(1)
    assert metrics.jensen_shannon([2, 2], [5, 5]) == 0
    half = 0.5 * math.log2(4 / 3) + 0.5 * (0.5 * math.log2(2 / 3) + 0.5 * math.log2(2))
    assert metrics.jensen_shannon([1, 0], [1, 1]) == pytest.approx(half)
    with pytest.raises(ValueError, match="one length, got 1 and 2"):
        metrics.jensen_shannon([1], [1, 2])
    with pytest.raises(ValueError, match="positive sum, got 0 and 1"):
        metrics.jensen_shannon([0], [1])


@given(one=WEIGHTS, other=WEIGHTS)
def test_jensen_shannon_is_symmetric_and_bounded(one: list[float], other: list[float]) -> None:
    size = min(len(one), len(other))
    left = metrics.jensen_shannon(one[:size], other[:size])
    assert 0 <= left <= 1
    assert left == pytest.approx(metrics.jensen_shannon(other[:size], one[:size]), abs=1e-12)
    assert metrics.jensen_shannon(one, one) == pytest.approx(0, abs=1e-12)


def test_token_divergence_counts_what_only_one_list_names_as_the_rest() -> None:
    one = {"a": math.log(0.5), "b": math.log(0.25), "c": math.log(0.25)}
    other = {"a": math.log(0.25), "b": math.log(0.5), "d": math.log(0.25)}
    expected = metrics.jensen_shannon([0.5, 0.25, 0.25], [0.25, 0.5, 0.25])
    assert metrics.token_divergence(one, other) == pytest.approx(expected)
    assert metrics.token_divergence(one, one) == pytest.approx(0, abs=1e-12)
