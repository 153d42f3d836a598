# SPDX-License-Identifier: Apache-2.0
"""The queries that prefills keep: never more than the KV pool has left room for."""

from __future__ import annotations

import random
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_policy import AddReqResult
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from aircache_patches import pool, prefill, process
from aircache_patches.refusal import Refusal
from aircache_sglang.config import INSTRUCTION_LIMIT, AirCacheConfig
from aircache_sglang.engine.backend import AttentionState
from aircache_sglang.engine.compressor import Compressor, same_frames
from aircache_sglang.engine.model import query_bytes
from aircache_sglang.engine.pressure import Pressure
from aircache_sglang.engine.request import RequestState
from aircache_sglang.runtime.choice import policy_of
from aircache_sglang.runtime.decide import Intent
from aircache_sglang.runtime.spans import VisualPrompt
from aircache_sglang.runtime.stash import QUERY_ROWS, BatchStash, query_rows

LAYERS, HEADS, DIM = 2, 1, 4


def intent_of(head: int, pictures: list[int], between: int, tail: int, **config: Any) -> Intent:
    spans, at = [], head
    for tokens in pictures:
        spans.append((at, at + tokens))
        at += tokens + between
    length = spans[-1][1] + tail
    return Intent(AirCacheConfig(**config), VisualPrompt(tuple(spans), length, sum(pictures)), 1)


def video_request(*frames: int) -> Any:
    features = [torch.empty(1, n, 3, 2, 2) for n in frames]
    items = [SimpleNamespace(is_video=lambda: True, feature=f) for f in features]
    items.append(SimpleNamespace(is_video=lambda: False, feature=torch.empty(1, 9, 3, 2, 2)))
    return SimpleNamespace(multimodal_inputs=SimpleNamespace(mm_items=items))


def test_videos_of_one_length_are_prefilled_together() -> None:
    text, six, eight = SimpleNamespace(multimodal_inputs=None), video_request(6), video_request(8)
    assert same_frames(six, []) and same_frames(six, [text, video_request(6)])
    assert same_frames(text, [six]) and same_frames(video_request(), [eight])
    assert not same_frames(eight, [text, six])
    # Alone every request is admitted.
    assert same_frames(video_request(6, 8), [text])


def test_no_request_keeps_more_than_fits_alone() -> None:
    longest = intent_of(5, [400, 400], 700, 3000, window=f"visual-{INSTRUCTION_LIMIT}")
    assert query_rows(longest) == QUERY_ROWS
    assert query_rows(intent_of(5, [400], 0, 30)) == 30
    assert query_rows(intent_of(5, [400, 9], 3, 30, window="visual-20")) == 50


class Server:
    """As much of SGLang's scheduler as puts prefill batches together, around a real compressor.

    chunk: tokens of a batch, None without chunked prefill. A prompt in chunks may have to wait
    while others are admitted.
    """

    def __init__(self, rng: random.Random, chunk: int | None) -> None:
        self.rng, self.chunk = rng, chunk
        self.waiting = [self.request(row) for row in range(1, 80)]
        self.chunked_req: Any = None
        self.batch: list[tuple[Any, int]] = []
        self.left = 0
        self.packed = 0
        self.most = 0
        self.buffers: list[weakref.ref[BatchStash]] = []
        self.compressor = self.bare_compressor()

    def bare_compressor(self) -> Any:
        found: Any = Compressor.__new__(Compressor)
        found.pool = SimpleNamespace(layer_num=LAYERS)
        nothing: Any = SimpleNamespace()
        found.attention = AttentionState(found.pool, nothing, nothing, lambda: None)
        found.table = SimpleNamespace(
            clear=lambda rows: None, req_to_token=torch.zeros(400, 1, dtype=torch.int32)
        )
        found.records, found.surplus, found._made_room = {}, {}, False
        found.compress, found.pressure = self.run_pass, Pressure(nothing, {}, nothing)
        return found

    def request(self, row: int) -> Any:
        window = self.rng.choice(["elite", "elite", "visual-60", f"visual-{INSTRUCTION_LIMIT}"])
        pictures = [self.rng.randrange(1, 300) for _ in range(self.rng.randrange(1, 4))]
        tail = self.rng.choice([1, 40, 300, 700])
        intent = intent_of(3, pictures, 2, tail, window=window)
        return SimpleNamespace(
            kv=SimpleNamespace(req_pool_idx=row),
            last_node=SimpleNamespace(replica=None),
            prefix_len=0,
            origin_input_ids=range(intent.prompt.length),
            aircache=RequestState(decided_for=intent.prompt.length, intent=intent),
        )

    def add(self, adder: Any, req: Any) -> AddReqResult:
        """PrefillAdder.add_one_req and add_chunked_req."""
        size = len(req.origin_input_ids) - req.prefix_len
        size = size if self.chunk is None else min(size, self.left)
        self.left -= size
        self.batch.append((req, size))
        return AddReqResult.CONTINUE

    def schedule(self, scheduler: Any, running_batch: Any) -> None:
        """Scheduler.get_new_batch_prefill."""
        self.batch, self.left = [], self.chunk or 16384
        if self.chunked_req is not None and self.rng.random() < 0.8:
            self.add(None, self.chunked_req)
        while self.waiting and self.left > 0:
            req = self.waiting[0]
            if self.chunked_req is not None and len(req.origin_input_ids) > self.left:
                break
            adder = SimpleNamespace(
                can_run_list=[other for other, _ in self.batch],
                rem_chunk_tokens=self.chunk and self.left,
                tree_cache=SimpleNamespace(chunk_end=lambda req: None),
            )
            if prefill.add_one_req(self.add, adder, req) is not AddReqResult.CONTINUE:
                break
            self.waiting.pop(0)

    def carried(self) -> int:
        """Rows that the prompt in chunks has kept before this batch."""
        if self.chunked_req is None or self.chunked_req.aircache.stash is None:
            return 0
        stash = self.chunked_req.aircache.stash
        return sum(
            own.shape[1] for part in (stash._instruction, *stash._visual) for own in part._own
        )

    def step(self) -> None:
        prefill.get_new_batch_prefill(self.schedule, self, SimpleNamespace(reqs=[]))
        if not self.batch:
            return
        for req, size in self.batch:
            if req.prefix_len + size == len(req.origin_input_ids):
                record: Any = SimpleNamespace(
                    budgets=None, reused=False, surplus=None, intent=req.aircache.intent, seconds=0
                )
                self.compressor.records[req.kv.req_pool_idx] = record
        batch = SimpleNamespace(
            forward_mode=ForwardMode.EXTEND,
            reqs=[req for req, _ in self.batch],
            req_pool_indices=[],
            prefix_lens=[req.prefix_len for req, _ in self.batch],
            extend_lens=[size for _, size in self.batch],
            hicache_consumer_index=-1,
            decoding_reqs=None,
        )
        self.compressor.run_forward(batch, lambda: self.layers(batch))
        for req, size in self.batch:
            req.prefix_len += size
        unfinished = [r for r in batch.reqs if r.prefix_len < len(r.origin_input_ids)]
        if self.chunked_req is None or self.chunked_req in batch.reqs:
            self.chunked_req = unfinished[0] if unfinished else None

    def layers(self, batch: Any) -> None:
        """Every layer hands over its queries, which are their positions."""
        queries, before = self.compressor.attention.work.queries, self.carried()
        self.most = max(self.most, before + (0 if queries is None else len(queries)))
        if queries is None:
            return
        self.buffers.append(weakref.ref(queries))
        spans = zip(batch.prefix_lens, batch.extend_lens, strict=True)
        positions = torch.cat([torch.arange(start, start + n) for start, n in spans])
        for layer in range(LAYERS):
            queries.write(layer, positions.view(-1, 1, 1).expand(-1, HEADS, DIM).float())

    def run_pass(self, jobs: Any) -> None:
        for job in jobs:
            lo, hi = job.record.intent.prompt.instruction
            assert job.q[:, :, 0, 0].tolist() == [list(range(lo, hi))] * LAYERS
            window = policy_of(job.record.intent.config).visual_window
            if window:
                seen = job.record.intent.prompt.visual_positions()[-window:].tolist()
                assert job.q_visual[:, :, 0, 0].tolist() == [seen] * LAYERS
            job.record.budgets = torch.ones(LAYERS)
            self.packed += 1


@pytest.mark.parametrize("chunk", [64, 700, 8192, None])
@pytest.mark.parametrize("seed", range(3))
def test_no_batch_keeps_more_than_the_bound(
    seed: int, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(random.Random(seed), chunk)
    monkeypatch.setattr(process, "_compressor", server.compressor)
    total = len(server.waiting)
    while server.waiting or server.chunked_req is not None:
        server.step()
        alive = [ref for ref in server.buffers if ref() is not None]
        assert not alive, "a forward's buffer outlives its pass"
    assert server.packed == total
    assert QUERY_ROWS * (0.5 if chunk == 64 else 0.9) < server.most <= QUERY_ROWS


def config(**changes: Any) -> Any:
    """Qwen2-VL-7B."""
    given = {"num_hidden_layers": 28, "head_dim": 128, "dtype": torch.bfloat16} | changes
    given.setdefault("hf_text_config", SimpleNamespace())
    return SimpleNamespace(get_num_attention_heads=lambda tp_size: 28 // tp_size, **given)


def test_the_kv_pool_leaves_room_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert query_bytes(config(), 1) == 196 << 20 == 2 * query_bytes(config(), 2)
    hybrid = config(hf_text_config=SimpleNamespace(full_attention_layer_ids=[3, 7]))
    assert 14 * query_bytes(hybrid, 1) == query_bytes(config(), 1)
    buffer = torch.empty(28, QUERY_ROWS, 28, 128, dtype=torch.bfloat16, device="meta")
    assert query_bytes(config(), 1) == buffer.nbytes
    monkeypatch.setattr(pool, "get_parallel", lambda: SimpleNamespace(attn_tp_size=2))
    configurator = SimpleNamespace(model_config=config(), kv_cache_dtype=torch.bfloat16)
    monkeypatch.setattr(process, "_policy", ("aircache", AirCacheConfig()))
    left = pool.profile_available_bytes(lambda self, before: 1 << 30, configurator, 7)
    assert left == (1 << 30) - (98 << 20)
    with pytest.raises(Refusal, match="needs 98 MiB beside the KV pool"):
        pool.profile_available_bytes(lambda self, before: 98 << 20, configurator, 7)
    # Under pressure the order of the first rung stands beside the KV: an int32 for two rows of
    # 128 numbers in 16 bits, for half of the cells.
    under = AirCacheConfig(when="pressure", rungs=(0.5, 0.1))
    monkeypatch.setattr(process, "_policy", ("aircache", under))
    less = pool.profile_available_bytes(lambda self, before: 1 << 30, configurator, 7)
    assert left - less == int(left * (2 / 512) / (1 + 2 / 512))
