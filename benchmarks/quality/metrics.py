# SPDX-License-Identifier: Apache-2.0
"""How an answer is scored: the published metric of each data set, each in [0, 1] an answer.

Also the divergences between distributions that two settings give.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_WORD_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_LETTER = re.compile(
    r"(?:the )?(?:correct )?(?:answer|option)?(?: is)?:?\s*\(?([A-Z])\)?(?:$|[\s.,:)])", re.I
)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers, but for white space and case."""
    return float(_folded(prediction) in map(_folded, answers))


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity to the nearest answer, 0 below the threshold.

    Biten et al. 2019 (arXiv 1905.13648), as the DocVQA and InfographicVQA challenges score.
    """
    best = 0.0
    for answer in map(_folded, answers):
        guess = _folded(prediction)
        longest = max(len(guess), len(answer))
        best = max(best, 1 - edit_distance(guess, answer) / longest if longest else 1.0)
    return best if best >= threshold else 0.0


def edit_distance(one: str, other: str) -> int:
    """Levenshtein: insertions, deletions and substitutions."""
    previous = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        current = [i]
        for j, b in enumerate(other, 1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (a != b)))
        previous = current
    return previous[-1]


def relaxed_accuracy(prediction: str, answers: Sequence[str], tolerance: float = 0.05) -> float:
    """1 for a number within 5 % of the answer's, or for the same text (ChartQA, 2203.10244).

    A per cent sign divides by 100, and an answer of 0 has to be met as text.
    """
    guess = _number(prediction)
    for answer in answers:
        target = _number(answer)
        if guess is not None and target:
            if abs(guess - target) / abs(target) <= tolerance:
                return 1.0
        elif prediction.strip().lower() == answer.strip().lower():
            return 1.0
    return 0.0


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Agreement with ten annotators: for each left out, a third of the others that agree (TextVQA).

    Answers are compared without punctuation, articles and number words. The original also restores
    the apostrophes of contractions, which both sides lose here.
    """
    guess, given = _vqa_form(prediction), [_vqa_form(answer) for answer in answers]
    matches = [
        min(1.0, sum(other == guess for other in given[:i] + given[i + 1 :]) / 3)
        for i in range(len(given))
    ]
    return sum(matches) / len(matches)


def yes_no(prediction: str, answers: Sequence[str]) -> float:
    """1 if the answer begins with the right one of yes and no (MME, arXiv 2306.13394)."""
    start = prediction.strip().lower()[:4]
    said = next((word for word in ("yes", "no") if word in start), None)
    return float(said == answers[0].strip().lower())


def choice(prediction: str, options: Mapping[str, str]) -> str | None:
    """The option that an answer chooses, by its letter or its text; None if neither.

    MMBench (arXiv 2307.06281) asks a language model where these fail; here they count as wrong.
    """
    text = prediction.strip()
    same = [key for key, option in options.items() if _folded(option) == _folded(text)]
    if same:
        return same[0]
    letter = _LETTER.match(text)
    if letter and letter[1].upper() in options and (letter[1].isupper() or len(text) <= 2):
        return letter[1].upper()
    whole = {key: rf"(?<!\w){re.escape(_folded(option))}(?!\w)" for key, option in options.items()}
    named = [key for key, pattern in whole.items() if re.search(pattern, _folded(text))]
    return named[0] if len(named) == 1 else None


def mme_score(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> float:
    """acc + acc+ in per cent, added up over tasks: {task: {picture: scores of its questions}}."""
    total = 0.0
    for pictures in scores.values():
        single = [score for of_picture in pictures.values() for score in of_picture]
        both = [min(of_picture) for of_picture in pictures.values()]
        total += 100 * (sum(single) / len(single) + sum(both) / len(both))
    return total


def jensen_shannon(one: Sequence[float], other: Sequence[float]) -> float:
    """Jensen-Shannon divergence in bits, in [0, 1], of two weightings; each is normalised first."""
    if len(one) != len(other):
        raise ValueError(f"weightings must have one length, got {len(one)} and {len(other)}")
    if not (sum(one) > 0 and sum(other) > 0):
        raise ValueError(f"weightings must have a positive sum, got {sum(one)} and {sum(other)}")
    p, q = ([w / sum(weights) for w in weights] for weights in (one, other))
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    bits = sum(a * math.log2(a / c) for w in (p, q) for a, c in zip(w, m, strict=True) if a > 0) / 2
    return min(1.0, max(0.0, bits))


def token_divergence(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Jensen-Shannon divergence in bits of two next-token distributions, from their top logprobs.

    Tokens that both lists name stand for themselves, all others together for one: a lower bound.
    """
    common = sorted(one.keys() & other.keys())
    weights = []
    for tokens in (one, other):
        named = [math.exp(tokens[token]) for token in common]
        weights.append([*named, max(0.0, 1 - sum(named))])
    return jensen_shannon(*weights)


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        number = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _vqa_form(text: str) -> str:
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower())
    text = re.sub(r"(?<!\d)\.|\.(?!\d)|[';!?\"`,:]", "", text)
    text = re.sub(r"[/\[\](){}=+\\_<>@|~^&*-]", " ", text)
    words = (_WORD_NUMBERS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in ("a", "an", "the"))
