# SPDX-License-Identifier: Apache-2.0
"""What is measured, in which order, and whether it fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from aircache_sglang.policy import columns
from benchmarks.records import Row

INSTRUCTION_TOKENS = 64
GATE_RETENTION = 0.1
# Text before the pictures, and what marks each of them.
HEAD_TOKENS, MARK_TOKENS = 8, 2


@dataclasses.dataclass(frozen=True, slots=True)
class Preset:
    """A sweep over batch sizes and prompt lengths.

    model: its shape, the arguments of its factory. flags, env: of both servers.
    retentions: of the compressing server, beside stock SGLang.
    tokens: of each answer. picture_tokens: visual tokens a picture.
    rounds: how often each cell is measured, the variants taking turns (A B B A).
    side_by_side: both servers run at once, so that the variants of a cell follow one another; else
        they take turns by the round.
    family: of the model, one of FAMILIES in `run.py`.
    needs_gpu: its model is none for a CPU.
    when: `pressure` asks at retention 1 for GATE_RETENTION under pressure instead, of which a pool
        with room packs nothing.
    gate_visual, gate_tokens: visual tokens and answers' lengths of the single requests with which
        `--aircache-gate auto` is compared with `off`; after the sweep.
    """

    name: str
    model: Mapping[str, Any]
    flags: Sequence[str]
    batches: Sequence[int]
    visual: Sequence[int]
    tokens: int
    rounds: int
    side_by_side: bool
    family: str = "qwen2-vl"
    needs_gpu: bool = False
    retentions: Sequence[float] = (1.0, 0.5, 0.1)
    picture_tokens: int = 1024
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    when: str = "prefill"
    gate_visual: Sequence[int] = ()
    gate_tokens: Sequence[int] = ()

    def check(self) -> None:
        """Raise ValueError for what cannot be measured."""
        if self.when == "pressure" and list(self.retentions) != [1.0]:
            raise ValueError("a pool with room packs nothing under pressure: add --retention 1")
        for batch in self.batches:
            if batch < 1:
                raise ValueError(f"a batch must be at least 1, got {batch}")
        for n in self.visual:
            if n < 1 or n % self.picture_tokens:
                raise ValueError(
                    f"visual tokens must be a multiple of {self.picture_tokens}, got {n}"
                )

    def about(self) -> Row:
        """What rows carry of this preset: those of another one cannot stand in the same file."""
        return {
            "preset": f"{self.name}: answers of {self.tokens} tokens, "
            f"pictures of {self.picture_tokens}"
            + (", whole under pressure" if self.when == "pressure" else ""),
            "model": "random weights, " + ", ".join(f"{k} {v}" for k, v in self.model.items()),
            "flags": " ".join(self.flags),
        }

    @property
    def pictures(self) -> int:
        """Different pictures: each request of a batch begins with another one."""
        return max(*self.batches, *(n // self.picture_tokens for n in self.visual))


# KV is 6 KiB a token and outweighs the 1.1 million parameters from a thousand tokens on.
SMALL = {
    "layers": 6,
    "heads": 2,
    "kv_heads": 2,
    "head_dim": 64,
    "intermediate_size": 128,
    "vision_depth": 1,
}
# The decoder of Qwen2-VL-7B without its weights, and a vision tower that is not measured.
QWEN2_VL_7B = {
    "layers": 28,
    "heads": 28,
    "kv_heads": 4,
    "head_dim": 128,
    "intermediate_size": 18_944,
    "vision_depth": 1,
    "vocab_size": 152_064,
    "max_position_embeddings": 40_960,
    "dtype": "bfloat16",
    "write_weights": False,
}
# Qwen3.5, three recurrent layers to one that attends; KV is 8 KiB a token.
HYBRID = {
    "num_hidden_layers": 8,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 20_480,
    "patch": 14,
}
COMMON = ("--enable-metrics", "--load-snapshot-publish-interval", "1")

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "cpu-small",
            SMALL,
            (
                *("--device", "cpu", "--dtype", "float32", "--max-total-tokens", "53248"),
                *("--context-length", "16384", "--chunked-prefill-size", "4096"),
                *("--max-running-requests", "16", "--sleep-on-idle", *COMMON),
            ),
            batches=(1, 4, 8),
            visual=(1024, 4096, 8192),
            tokens=97,
            rounds=3,
            side_by_side=True,
            gate_visual=(1024, 4096),
            gate_tokens=(2, 8, 32),
        ),
        Preset(
            "cpu-hybrid",
            HYBRID,
            (
                *("--device", "cpu", "--dtype", "float32", "--max-total-tokens", "36864"),
                *("--context-length", "16384", "--chunked-prefill-size", "4096"),
                *("--max-running-requests", "8", "--sleep-on-idle", *COMMON),
                *("--disable-radix-cache", "--mamba-ssm-dtype", "float32"),
            ),
            batches=(1, 4),
            visual=(1024, 4096),
            tokens=97,
            rounds=3,
            side_by_side=True,
            family="qwen3.5",
            env={"SGLANG_MAMBA_CONV_DTYPE": "float32"},
        ),
        Preset(
            "table3",
            QWEN2_VL_7B,
            (
                *("--load-format", "dummy", "--dtype", "bfloat16", "--context-length", "36864"),
                *("--max-running-requests", "32", *COMMON),
            ),
            batches=(1, 8, 16, 32),
            visual=(2048, 8192, 16_384, 32_768),
            tokens=512,
            rounds=2,
            side_by_side=False,
            needs_gpu=True,
            # SGLang forgets the embeddings of pictures beyond 100 MB.
            env={"SGLANG_VLM_CACHE_SIZE_MB": "2048"},
        ),
    )
}


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """One measurement; retention None is stock SGLang."""

    retention: float | None
    batch: int
    visual_tokens: int
    round: int

    @property
    def policy(self) -> str:
        return "none" if self.retention is None else "aircache"

    def key(self) -> Row:
        return {"benchmark": "serving", "policy": self.policy, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True, slots=True)
class GateCell:
    """One request with a short answer; gate None is stock SGLang, else `auto` or `off`."""

    gate: str | None
    visual_tokens: int
    tokens: int
    round: int

    @property
    def retention(self) -> float | None:
        return None if self.gate is None else GATE_RETENTION

    def key(self) -> Row:
        return {"benchmark": "gate", "retention": self.retention, **dataclasses.asdict(self)}

    def cell(self) -> Cell:
        """The cell of the sweep that this is with another length of the answer."""
        return Cell(self.retention, 1, self.visual_tokens, self.round)


def plan_gate(preset: Preset) -> list[GateCell]:
    """Those of the lengths that the sweep has, the variants of a request one after another."""
    if 1 not in preset.batches or not preset.side_by_side:
        return []
    if GATE_RETENTION not in preset.retentions:
        return []
    return [
        GateCell(gate, n, tokens, round_)
        for n in preset.gate_visual
        if n in preset.visual
        for tokens in preset.gate_tokens
        for round_ in range(preset.rounds)
        for gate in (None, "auto", "off")
    ]


def plan(preset: Preset, *, stock: bool = True) -> list[Cell]:
    """All cells in the order in which they are measured, small ones first; `stock`: its too."""
    settings = [*([None] if stock else []), *preset.retentions]
    sizes = [(batch, n) for n in preset.visual for batch in preset.batches]
    if preset.side_by_side:
        return [
            Cell(retention, batch, n, round_)
            for batch, n in sizes
            for round_ in range(preset.rounds)
            # There and back, so that nobody always comes first.
            for retention in (settings if round_ % 2 == 0 else reversed(settings))
        ]
    return [
        Cell(retention, batch, n, round_)
        for round_ in range(preset.rounds)
        for policy in ("none", "aircache")
        for batch, n in sizes
        for retention in settings
        if (retention is None) == (policy == "none")
    ]


def prompt_tokens(preset: Preset, visual_tokens: int) -> int:
    """Length of a prompt of the benchmark, on the safe side."""
    marks = MARK_TOKENS * (visual_tokens // preset.picture_tokens)
    return HEAD_TOKENS + marks + visual_tokens + INSTRUCTION_TOKENS


def pool_tokens(preset: Preset, cell: Cell) -> int:
    """Slots that a cell needs when its prefill ends: all prompts, answers and columns."""
    m = 0 if cell.retention in (None, 1.0) else columns(cell.retention, cell.visual_tokens)
    return cell.batch * (prompt_tokens(preset, cell.visual_tokens) + preset.tokens + m)


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Of a server: tokens of its pool and of one request, requests that run at once."""

    pool: int
    context: int
    running: int

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Limits:
        """From /server_info."""
        states = info.get("internal_states") or [{}]
        return cls(
            info["max_total_num_tokens"],
            info["context_length"] or info.get("max_req_input_len") or 2**31,
            states[0].get("effective_max_running_requests_per_dp") or 2**31,
        )


def does_not_fit(preset: Preset, cell: Cell, limits: Limits) -> str | None:
    """Why a server cannot hold a cell, in one sentence."""
    what = f"{cell.batch} x {cell.visual_tokens} visual tokens"
    length = prompt_tokens(preset, cell.visual_tokens) + preset.tokens
    if length > limits.context:
        return f"{what} need a context of {length} tokens, the server's is {limits.context}"
    if cell.batch > limits.running:
        return f"{what} are more requests than the server runs at once, {limits.running}"
    needed = pool_tokens(preset, cell)
    if needed > limits.pool:
        return f"{what} need {needed} tokens of KV, the server's pool holds {limits.pool}"
    return None
