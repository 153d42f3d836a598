# SPDX-License-Identifier: Apache-2.0
"""SGLang's own tree and ours on the same traces: text is hit no less often."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from sglang.srt.managers.schedule_batch import MM_PAD_SHIFT_VALUE

from aircache_sglang.config import AirCacheConfig
from benchmarks.bench_sharing import Turn, replay

POOL = 400


def picture(name: int, tokens: int) -> list[int]:
    return [MM_PAD_SHIFT_VALUE + 10 * name + i % 4 for i in range(tokens)]


def zipf(rng: random.Random, n: int) -> int:
    return min(int(rng.paretovariate(0.7)) - 1, n - 1)


def texts_and_pictures(rng: random.Random) -> list[Turn]:
    """Half of the requests about one of 60 texts, half about one of 30 pictures."""
    new, trace = itertools.count(100_000), []
    lengths = [rng.randint(4, 40) for _ in range(60)]
    for _ in range(400):
        which = zipf(rng, 60)
        text = [1000 * which + i for i in range(lengths[which])]
        ids = text if rng.random() < 0.5 else [7, 8, *picture(which % 30, 40)]
        ids += itertools.islice(new, 3)
        trace.append((ids, len(ids)))
    return trace


def dead_pictures(rng: random.Random) -> list[Turn]:
    """Pictures that nobody asks about again, then texts that nearly fill the pool."""
    new = itertools.count(100_000)
    prompts = [[7, 8, *picture(which, 40), next(new)] for which in range(5) for _ in range(2)]
    for _ in range(300):
        which = rng.randrange(30)
        prompts.append([*range(1000 * which, 1000 * which + 10), next(new)])
    return [(ids, len(ids)) for ids in prompts]


def text_chats(rng: random.Random, share_with_picture: float = 0.0) -> list[Turn]:
    """Turns of 40 chats, some of them about a picture; a long one begins anew."""
    new, trace = itertools.count(100_000), []
    chats: dict[int, list[int]] = {}
    for _ in range(400):
        which = zipf(rng, 40)
        seen = picture(which, 40) if which < 40 * share_with_picture else []
        ids = chats.setdefault(which, [7, 8, next(new), *seen])
        ids += itertools.islice(new, 3)
        prompt_len = len(ids)
        ids += itertools.islice(new, 3)
        trace.append((list(ids), prompt_len))
        if len(ids) - len(seen) > 50:
            del chats[which]
    return trace


def mixed_chats(rng: random.Random) -> list[Turn]:
    return text_chats(rng, 0.5)


def pictures_between_texts(rng: random.Random) -> list[Turn]:
    """Prompts of three pictures with text between them."""
    new, trace = itertools.count(100_000), []
    for _ in range(300):
        which, ids = zipf(rng, 8), [7, 8]
        for place in range(3):
            ids += picture(3 * which + place, 30)
            ids += (1000 * which + 100 * place + i for i in range(6))
        ids.append(next(new))
        trace.append((ids, len(ids)))
    return trace


TRACES = (texts_and_pictures, dead_pictures, text_chats, mixed_chats, pictures_between_texts)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("make", TRACES)
def test_text_is_hit_no_less_than_by_stock(
    make: Callable[[random.Random], list[Turn]], seed: int
) -> None:
    trace = make(random.Random(seed))
    stock = replay(trace, None, POOL)["hit_tokens_text"]
    default = replay(trace, AirCacheConfig().pin_text, POOL)["hit_tokens_text"]
    unpinned = replay(trace, 0.0, POOL)["hit_tokens_text"]
    assert 0 < stock <= min(default, unpinned)
    if make in (texts_and_pictures, dead_pictures, text_chats):
        # Without a preference the order is SGLang's own; nodes cut at pictures hold on to more.
        assert unpinned == stock


def test_pinning_spares_text_that_pictures_pass_by() -> None:
    trace = texts_and_pictures(random.Random(0))
    hits = [replay(trace, share, POOL)["hit_tokens_text"] for share in (0.0, 0.25, 0.5, 1.0)]
    assert hits == sorted(hits) and hits[-1] > 1.1 * hits[0]


def test_text_alone_without_a_bound_loses_recent_answers_to_stale_prompts() -> None:
    trace = text_chats(random.Random(0))
    hits = [replay(trace, share, POOL)["hit_tokens_text"] for share in (None, 0.5, 1.0)]
    assert hits[0] == hits[1] > hits[2]


def test_pictures_of_a_prompt_yield_from_its_end() -> None:
    """What is left of a prompt is then a hit."""
    trace = pictures_between_texts(random.Random(0))
    stock, ours = (replay(trace, share, POOL)["hit_tokens_visual"] for share in (None, 0.5))
    assert ours > 1.3 * stock
