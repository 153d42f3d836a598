# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters in the radix cache: the same tokens are other KV under another adapter.

SGLang ends `extra_key` with the adapter's id (managers/schedule_batch.py, Req). Here it is part of
what a slot must hold, so that any slot, replica or column that crosses adapters shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize

from aircache_sglang.engine.tree import Kind
from tests.unit import test_radix_cache as radix
from tests.unit.test_radix_cache import (  # the fixtures are used by their names
    REUSE,
    SESSION,
    FakeReq,
    Scheduler,
    World,
    pictures,
    published_settings,
    report,
    run_machine,
    short_instructions,
)

__all__ = ["published_settings", "short_instructions"]

ADAPTERS = (None, "one", "two")
_of_no_adapter = radix.truth


class WorldOfAdapters(World):
    """Requests take turns with the adapters, and every slot holds what its own one computed."""

    adapter: str | None = None

    @contextlib.contextmanager
    def under(self, adapter: str | None) -> Iterator[None]:
        """Compute, or expect, what this adapter makes of tokens."""
        before, WorldOfAdapters.adapter = WorldOfAdapters.adapter, adapter
        try:
            yield
        finally:
            WorldOfAdapters.adapter = before

    def submit(self, *args: Any, adapter: str | None = "by turns") -> FakeReq:
        req = super().submit(*args)
        req.extra_key = ADAPTERS[req.rid % 3] if adapter == "by turns" else adapter
        return req

    def _forward(self, req: FakeReq, extend: int) -> None:
        with self.under(req.extra_key):
            super()._forward(req, extend)

    def decode(self, req: FakeReq, *, mixed: bool = False) -> bool:
        with self.under(req.extra_key):
            return super().decode(req, mixed=mixed)

    def _check_node(self, node: Any, tokens: tuple[int, ...]) -> None:
        with self.under(node.key.extra_key):
            super()._check_node(node, tokens)

    def _check_row(self, req: FakeReq) -> None:
        with self.under(req.extra_key):
            super()._check_row(req)


@pytest.fixture(autouse=True)
def truth_of_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    def truth(tokens: tuple[Any, ...]) -> float:
        return _of_no_adapter((WorldOfAdapters.adapter, *tokens))

    monkeypatch.setattr(radix, "truth", truth)


@pytest.mark.parametrize("when", ["prefill", "pressure"])
@pytest.mark.parametrize("config", [{}, REUSE])
def test_the_same_question_of_two_adapters_and_none(when: str, config: dict[str, Any]) -> None:
    """Each computes it once; a second time each finds its own, and nobody else's."""
    world = WorldOfAdapters(400, when=when)
    ids, spans = pictures((10, 1), (5, 2), between=3)
    hits = []
    for adapter in (*ADAPTERS, *ADAPTERS):
        req = world.submit([*ids, 7, 8, 9], spans, config, adapter=adapter)
        assert world.prefill(req)
        world.check()
        hits.append(req.prefix_len)
        if req.last_node.replica is not None:
            assert req.last_node.key.extra_key == adapter
        world.result(req)
        world.press(world.free_or_evictable() + 1)
        world.check()
        assert report(req)["columns"] >= 6
        assert world.decode(req)
        world.check()
        world.finish(req)
        world.check()
    assert hits[:3] == [0, 0, 0]
    assert all(hit >= len(ids) for hit in hits[3:])
    replicas = [node.key.extra_key for node, _ in world.nodes() if node.kind is Kind.PACKED]
    assert sorted(map(str, replicas)) == (["None", "one", "two"] if config else [])


@pytest.mark.parametrize("head", [[1, 2, 3, 4], []])
@pytest.mark.parametrize("config", [REUSE, SESSION])
def test_a_conversation_goes_on_under_its_own_adapter_alone(
    head: list[int], config: dict[str, Any]
) -> None:
    """Without a head the replicas of all adapters hang below the root."""
    world = WorldOfAdapters(400)
    n = len(head)
    ids, spans = [*head, *[radix.PAD + 1] * 10, 7, 8], [(n, n + 10)]
    first = world.run(world.submit(ids, spans, config, adapter="one"), steps=2)
    turn = first.ids
    world.finish(first)
    if config is SESSION:
        more = [radix.PAD + 2] * 5
        spans = [*spans, (len(turn), len(turn) + 5)]
        turn = [*turn, *more]
    for adapter, extends in (("two", False), (None, False), ("one", True)):
        req = world.submit([*turn, 30, 31, 32], spans, config, adapter=adapter)
        assert world.prefill(req)
        replica = req.last_node.replica
        assert (replica is not None) == extends
        world.check()
        world.result(req)
        world.decode(req)
        world.check()
        world.finish(req)
        world.check()


class Adapters(Scheduler):
    """Requests of any adapter in any order."""

    @initialize(size=st.sampled_from([60, 100]))
    def start(self, size: int) -> None:
        self.world = WorldOfAdapters(size, rows=4, when=self.when)
        self.past: list[tuple[list[int], Any, Any]] = []


class AdaptersUnderPressure(Adapters):
    when = "pressure"


@pytest.mark.parametrize("machine", [Adapters, AdaptersUnderPressure])
def test_no_slot_crosses_adapters_in_any_order(machine: type[Adapters]) -> None:
    run_machine(machine, max_examples=100)
