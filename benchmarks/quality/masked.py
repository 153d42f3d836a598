# SPDX-License-Identifier: Apache-2.0
"""Selections that no server packs, on the document model, by a mask in Transformers.

    python -m benchmarks.quality.masked

Budgets of their own for the KV heads of a layer do not fit into columns, which hold as many cells
of every head: a mask shows what they would answer. The same for what takes a policy apart.

| | paper | keeps |
|---|---|---|
| `aircache`, `global` | 2503.23956 | what a server keeps, to check the mask by |
| `global, heads` | | the L * H_kv * m highest importances of all layers and heads |
| `adakv` | 2407.11550 | SnapKV's votes; heads share by a layer's H_kv * m highest, a fifth evenly |
| `aircache, adakv` | | AirCache's scores and layer budgets, split so among the heads |
| `sparsemm` | 2506.05344 | SnapKV's votes; heads share by how often they read, a tenth evenly |
| `tgvkv, means` | 2606.03075 | the authors' product of means over heads; see policy/tgvkv.py |
| `text a, visual` | table 6 | AirCache over all tokens: text at a, visual tokens as listed |
| `answer's cells` | | those alone, which no policy can know; under 5 % of a page |
| `and one beside` | | the same with the cell on each side, up to 5.5 % |

An answer is right when every token is the likeliest after the right ones before it. `sparsemm`
needs to know the heads of a model beforehand: 100 pages of the training distribution, on which a
head scores where its highest attention is at the cell that the next character is read from, as its
authors count on pictures with known text.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aircache_sglang.policy import (
    States,
    columns,
    get_policy,
    largest_remainder,
)
from aircache_sglang.policy.prompt_attention import causal_attention, instruction_attention
from aircache_sglang.policy.tgvkv import text_weights
from aircache_sglang.testing.oracle import (
    Oracle,
    Selection,
    Trace,
    policy_budgets,
    policy_states,
)
from benchmarks.documents import CHECKPOINT
from benchmarks.documents.evaluate import text_of
from benchmarks.documents.questions import (
    EVALUATED,
    KINDS,
    Question,
    document,
    evaluation_set,
    wording,
)
from benchmarks.quality.report import percent
from benchmarks.quality.scores import gap_text, mean_gap
from benchmarks.records import RESULTS, Results, read
from benchmarks.report import table

FILE = RESULTS / "quality-masked.jsonl"
RETENTIONS = (0.5, 0.1, 0.05, 0.02, 0.01)
EVEN, CERTAIN = 0.2, 0.1  # AdaKV's floor_alpha, SparseMM's ratio: the authors' scripts
PAGES = 100  # of the training distribution, as many of each kind
# Of one page: three take a minute a sample.
ASKED = tuple(kind for kind in KINDS if EVALUATED[kind].pages == 1)
METHODS = ("aircache", "global", "global, heads", "adakv", "aircache, adakv", "sparsemm")
TABLE_6 = (0.5, 0.1)


def cells_by_head(scores: Tensor, counts: Tensor) -> list[list[list[int]]]:
    """The highest `counts[l, h]` scores of each layer and head, as ordinals."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return [
        [row[: int(n)].tolist() for row, n in zip(rows, heads, strict=True)]
        for rows, heads in zip(order, counts, strict=True)
    ]


def whole_heads(shares: Tensor, cells: int, cap: int) -> Tensor:
    """`cells` in proportion to `shares` [H_kv], each head at least one and at most `cap`."""
    return largest_remainder(shares.double(), max(cells, len(shares)), cap)


def of_heads(scores: Tensor, budgets: Tensor) -> Tensor:
    """AdaKV, int64 [L, H_kv]: the heads of a layer share by its highest scores, EVEN evenly."""
    n_layers, n_kv, n_visual = scores.shape
    rows = []
    for layer in range(n_layers):
        cells = n_kv * int(budgets[layer])
        top = scores[layer].flatten().topk(cells).indices // n_visual
        found = torch.bincount(top, minlength=n_kv).double()
        rows.append(whole_heads((1 - EVEN) * found + EVEN * cells / n_kv, cells, n_visual))
    return torch.stack(rows)


def by_reading(heads: Tensor, n_visual: int, m: int) -> Tensor:
    """SparseMM, int64 [L, H_kv]: CERTAIN * m each, the rest by the scores of the model's heads."""
    share = heads.double() / heads.sum() * (1 - CERTAIN) * m * heads.numel() + CERTAIN * m
    return whole_heads(share.flatten(), m * heads.numel(), n_visual).view_as(heads)


def chosen(method: str, states: States, heads: Tensor, retention: float) -> Selection:
    """What a method keeps of a request's visual tokens."""
    if method in ("aircache", "global", "global, heads", "aircache, adakv"):
        budget = "global" if method.startswith("global") else "aircache"
        policy = get_policy("aircache", budget=budget)
    else:
        policy = get_policy("tgvkv" if method == "tgvkv, means" else "snapkv")
    scores = means(states) if method == "tgvkv, means" else policy.score(states)
    n_layers, n_kv, n_visual = scores.shape
    m = columns(retention, n_visual)
    budgets = policy_budgets(policy, policy.statistics(states, scores), scores, m)
    if method == "global, heads":
        top = scores.flatten().topk(n_layers * n_kv * m).indices // n_visual
        counts = torch.bincount(top, minlength=n_layers * n_kv).view(n_layers, n_kv)
    elif method.endswith("adakv"):
        counts = of_heads(scores, budgets)
    elif method == "sparsemm":
        counts = by_reading(heads, n_visual, m)
    else:
        counts = budgets[:, None].expand(n_layers, n_kv)
    return cells_by_head(scores, counts)


def means(states: States) -> Tensor:
    """TGV-KV's scores as its authors compute them, the same for all heads, [L, H_kv, N_v]."""
    weights = text_weights(states).mean(dim=1)  # [L, N_t]
    n_layers, n_text = weights.shape
    total = torch.zeros(n_layers, states.k_visual.shape[1])
    seen = [0] * n_layers
    for layer, probabilities, visual in instruction_attention(states):
        rows = probabilities[..., visual].flatten(0, 1).mean(dim=0)  # [n, N_v]
        total[layer] += weights[layer, seen[layer] : seen[layer] + len(rows)] @ rows
        seen[layer] += len(rows)
    assert seen == [n_text] * n_layers
    return total[:, None].expand(-1, states.k_visual.shape[2], -1)


def reading_heads(oracle: Oracle) -> Tensor:
    """[L, H_kv], how often a head's highest attention is where the next character is read from."""
    total: Tensor | float = 0.0
    for kind in KINDS:
        for seed in range(PAGES // len(KINDS)):
            generator = np.random.default_rng((2506, 5344, KINDS.index(kind), seed))
            layout = EVALUATED[kind]
            made = document(layout, generator, held_out=False)
            ask = made.asks[generator.integers(len(made.asks))]
            prompt = wording(kind, ask.slots, generator)
            question = Question("", kind, prompt, ask.answer, made.sheets, ask.place, (seed,))
            text = text_of(oracle, question) + ask.answer
            inputs = oracle.encode(text, question.images())
            answer = oracle.processor.tokenizer.encode(ask.answer, add_special_tokens=False)
            assert len(answer) == len(ask.answer), "a character is a token"
            trace = oracle.run(inputs, answer[-1:])
            total = total + hits(trace, len(answer), trace.visual[list(question.cells)])
    assert isinstance(total, Tensor)
    return total


def hits(trace: Trace, n_answer: int, evidence: Tensor) -> Tensor:
    """[L, H_kv] of one answer; its characters are the prompt's last tokens."""
    n = trace.q.shape[1]
    positions = torch.arange(n - n_answer - 1, n - 1)  # what each character is drawn from
    rows = []
    for q, k in zip(trace.q, trace.k, strict=True):
        scale = q.shape[-1] ** -0.5
        seen = causal_attention(q[positions], k, positions, torch.arange(n), scale)
        rows.append((seen.argmax(-1) == evidence).double().mean(-1).sum(-1))
    return torch.stack(rows)


def of_all_tokens(trace: Trace) -> dict[float, Selection]:
    """AirCache over all tokens of the prompt, by retention."""
    states = policy_states(dataclasses.replace(trace, unified=True))
    policy = get_policy("aircache")
    scores = policy.score(states)
    statistics, found = policy.statistics(states, scores), {}
    for retention in TABLE_6:
        budgets = policy.budgets(statistics, scores.shape[2], columns(retention, scores.shape[2]))
        counts = budgets[:, None].expand(scores.shape[:2])
        found[retention] = cells_by_head(scores, counts)
    return found


def mixed(text: Selection, visual: Selection, is_visual: frozenset[int]) -> Selection:
    """Of the text what one selection keeps, of the visual tokens what the other does."""
    return [
        [
            [i for i in a if i not in is_visual] + [i for i in b if i in is_visual]
            for a, b in zip(ours, theirs, strict=True)
        ]
        for ours, theirs in zip(text, visual, strict=True)
    ]


def answers(oracle: Oracle, question: Question, heads: Tensor) -> Iterator[tuple[str, float, bool]]:
    """(method, retention, whether the answer is right)."""
    inputs = oracle.encode(text_of(oracle, question), question.images())
    answer = oracle.processor.tokenizer.encode(
        question.answer + "<|im_end|>", add_special_tokens=False
    )
    is_right = functools.partial(right, oracle, inputs, answer)
    full = oracle.run(inputs, answer)
    yield "full cache", 1.0, full.logprobs.argmax(-1).tolist() == answer
    states = policy_states(full)
    for retention in RETENTIONS:
        for method in METHODS:
            yield method, retention, is_right(chosen(method, states, heads, retention))
        if retention in TABLE_6:
            kept = chosen("tgvkv, means", states, heads, retention)
            yield "tgvkv, means", retention, is_right(kept)
    every_head = [len(heads[0])] * len(heads)
    for name, cells in zip(("answer's cells", "and one beside"), where(question), strict=True):
        yield name, 0.05, is_right([[cells] * n for n in every_head])
    parts, is_visual = of_all_tokens(full), frozenset(full.visual.tolist())
    for text in TABLE_6:
        for visual in TABLE_6:
            kept = mixed(parts[text], parts[visual], is_visual)
            yield f"text {text:.0%}, visual", visual, is_right(kept, unified=True)


def where(question: Question) -> tuple[list[int], list[int]]:
    """Ordinals of the answer's cells; of the same with one on each side."""
    cells, n_visual = question.cells, sum(sheet.bold.size for sheet in question.sheets)
    beside = range(max(cells.start - 1, 0), min(cells.stop + 1, n_visual))
    return list(cells), list(beside)


def right(
    oracle: Oracle, inputs: object, answer: Sequence[int], kept: Selection, unified: bool = False
) -> bool:
    """Whether the answer is the likeliest with nothing but what was kept."""
    trace = oracle.run(inputs, answer, kept, unified=unified)
    return bool(trace.logprobs.argmax(-1).tolist() == answer)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.masked")
    parser.add_argument("--samples", type=int, default=100, help="of each kind (default 100)")
    parser.add_argument("--file", type=Path, default=FILE, help="rows are added, one a sample")
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="checkpoint (our own)")
    arguments = parser.parse_args(argv)
    model: Path = arguments.model.resolve()
    if not (model / "model.safetensors").is_file():
        parser.error(f"--model must be a checkpoint folder, got {model}")
    oracle = Oracle(model)
    name = "document" if model == CHECKPOINT.resolve() else model.name
    results = Results(arguments.file, {"model": name})
    heads: Tensor | None = None
    for kind in ASKED:
        for question in evaluation_set(kind, arguments.samples):

            def run(question: Question = question) -> dict[str, object]:
                nonlocal heads
                if heads is None:
                    heads = reading_heads(oracle)
                found: dict[str, dict[str, bool]] = {}
                for method, retention, is_right in answers(oracle, question, heads):
                    found.setdefault(method, {})[str(retention)] = is_right
                return {"right": found}

            results.measure({"benchmark": "masked", "sample": question.id}, run)
    print(report(arguments.file))
    return 0


def report(path: Path) -> str:
    """Right answers in per cent, by method and retention; then the same less AirCache's."""
    rows = [row["right"] for row in read(path)]
    shares = (1.0, *RETENTIONS)
    found = {
        method: {r: [row[method][str(r)] for row in rows] for r in shares if str(r) in asked}
        for method, asked in rows[0].items()
    }
    rates = [
        [method, *(f"{100 * np.mean(right[r]):.1f}" if r in right else "-" for r in shares)]
        for method, right in found.items()
    ]
    less = [
        [
            method,
            *(less_than(right[r], found["aircache"][r]) if r in right else "-" for r in RETENTIONS),
        ]
        for method, right in found.items()
        if method not in ("full cache", "aircache")
    ]
    head = list(map(percent, shares))
    return (
        f"{len(rows)} samples\n\n{table(['right', *head], rates)}\n"
        "Less AirCache's, in points, with the 95 % interval of a paired bootstrap:\n\n"
        f"{table(['less aircache', *head[1:]], less)}"
    )


def less_than(ones: Sequence[bool], others: Sequence[bool]) -> str:
    """The mean difference in points and its interval; "0" where no answer differs."""
    gaps = [100 * (one - other) for one, other in zip(ones, others, strict=True)]
    return gap_text(mean_gap(gaps)) if any(gaps) else "0"


if __name__ == "__main__":
    sys.exit(main())
