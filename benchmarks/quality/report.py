# SPDX-License-Identifier: Apache-2.0
"""A result file as tables beside the paper's, in docs/quality.md, and as plots beside the rows."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.documents.questions import KINDS, evaluation_set
from benchmarks.quality import metrics
from benchmarks.quality.grid import read
from benchmarks.quality.scores import Scores, difference, gap_text, interval
from benchmarks.quality.settings import (
    ALL_BUDGETS,
    ALPHAS,
    AUDIENCES,
    BUDGETS,
    FLOORS,
    FULL,
    LOW,
    MERGED,
    ONE_TOKEN,
    POLICIES,
    POOLS,
    PRUNING,
    RANKED,
    RANKS,
    SHORT_WINDOWS,
    UNIFIED,
    UNIFIED_RETENTIONS,
    WINDOWS,
    Setting,
    current,
    merged,
    rare,
    with_floor,
)
from benchmarks.records import ROOT, Row, path_label, stored
from benchmarks.report import goal, table

PAGE = ROOT / "docs" / "quality.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
PAPER: dict[str, Any] = json.loads(Path(__file__).with_name("paper.json").read_text())
PAPER_MODEL = "Qwen2-VL-7B"  # of table 1; the ablations' is LLaVA-OV-7B
ONE_THRESHOLD = "global"
NAMES = {
    **{FULL: "full cache", "h2o": "H2O", "elastic": "Elastic Cache", "prefixkv": "PrefixKV"},
    **{"snapkv": "SnapKV", "aircache": "AirCache", "pyramidkv": "PyramidKV", "vlcache": "VL-Cache"},
    **{"mixkv": "MixKV", "tgvkv": "TGV-KV", ONE_THRESHOLD: "AirCache, one threshold"},
    **{"fastv": "FastV", "fastervlm": "FasterVLM", "ivtp": "IVTP"},
}
# Of figure 4: what, decimals, the rows' field.
RANK_MEASURES = (
    ("Score", 1, "score"),
    ("Tokens in common with the full cache's answer, the prefill's first among them", 2, "same"),
    ("Jensen-Shannon divergence in bits until the answers part", 4, "divergence"),
    ("Attention mass", 4, "visual_mass"),
)
WITHIN_FULL, ABOVE_SNAPKV = 1.0, 6.5  # points; the project's goals

Labelled = Sequence[tuple[str, Setting]]


def cell(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def percent(retention: float) -> str:
    return f"{100 * retention:g} %"


def of_paper(name: str, row: str, retention: float) -> float | None:
    """The mean over the paper's data sets; None where it has no such cell."""
    source = PAPER[name][PAPER_MODEL] if name == "table1" else PAPER[name]
    found = source.get(row, {}).get(f"{retention:g}")
    return statistics.fmean(found.values()) if found else None


def contestants(retentions: Sequence[float]) -> dict[str, list[Setting]]:
    """The lines of table 1, the full cache first, by a key of NAMES; AirCache's with the paper's
    budgets and with ours."""
    found = {FULL: [Setting.of(FULL)] * len(retentions)}
    found |= {policy: [Setting.of(policy, r) for r in retentions] for policy in POLICIES}
    found[ONE_THRESHOLD] = [Setting.of("aircache", r, budget="global") for r in retentions]
    return found


def policy_tables(scores: Scores, rows: Sequence[Row]) -> Iterator[str]:
    retentions = [r for r in scores.retentions(POLICIES) if r < 1]
    if not retentions:
        return
    asked = contestants(retentions)
    settings = [setting for line in asked.values() for setting in line]

    def lines(of: Scores, samples: Sequence[str]) -> Iterator[list[str]]:
        for name, cells in asked.items():
            if any(map(of.has, cells)):
                figures = [cell(of.score(setting, samples)) for setting in cells]
                yield [NAMES.get(name, name), *figures]

    head = ["policy", *map(percent, retentions)]
    samples = scores.common(settings)
    yield f"### Policies by retention (the paper's table 1)\n\n{len(samples)} samples, all kinds.\n"
    yield table(head, lines(scores, samples))
    kinds = list(dict.fromkeys(row["key"]["kind"] for row in rows))
    for kind in kinds if len(kinds) > 1 else []:
        of_kind = Scores(rows, kind)
        common = of_kind.common(settings)
        yield f"Kind `{kind}`, {len(common)} samples:\n"
        yield table(head, lines(of_kind, common))
    paper = [
        [NAMES[policy], *(cell(of_paper("table1", policy, r)) for r in retentions)]
        for policy in PAPER["table1"][PAPER_MODEL]
    ]
    yield f"The paper's, mean of ChartQA, InfoVQA, DocVQA and TextVQA, {PAPER_MODEL}:\n"
    yield table(head, paper)
    yield from policy_gaps(scores, retentions)
    if rows[0]["key"]["dataset"] == "ours":
        yield from goals(scores)


def policy_gaps(scores: Scores, retentions: Sequence[float]) -> Iterator[str]:
    """AirCache less each other, with intervals."""
    asked, lines = contestants(retentions), []
    ours = asked.pop("aircache")
    for name, others in asked.items():
        gaps = [difference(scores, *pair) for pair in zip(ours, others, strict=True)]
        if any(gaps):
            text = ["-" if gap is None else gap_text(gap) for gap in gaps]
            lines.append([NAMES.get(name, name), *text])
    if not lines:
        return
    yield "AirCache less each, in points, with the 95 % interval of a paired bootstrap:\n"
    yield table(["less", *map(percent, retentions)], lines)


def goals(scores: Scores) -> Iterator[str]:
    """What the project wants of its own documents."""
    gap = difference(scores, Setting.of("aircache", 0.1), Setting.of(FULL))
    if gap is not None:
        yield goal(
            gap[0] >= -WITHIN_FULL,
            f"AirCache at 10 % within {WITHIN_FULL:g} point of the full cache ({gap[0]:+.1f})",
        )
    for r in (0.1, 0.05, 0.01):
        contest = [Setting.of(p, r) for p in POLICIES if scores.has(Setting.of(p, r))]
        samples = scores.common(contest)
        if Setting.of("aircache", r) not in contest or len(contest) < 2 or not samples:
            continue
        reached = {setting.policy: scores.score(setting, samples) or 0.0 for setting in contest}
        ours = reached.pop("aircache")
        best = max(reached, key=lambda policy: reached[policy])
        yield goal(
            ours >= reached[best],
            f"AirCache first, or level, of {len(contest)} policies at {percent(r)} "
            f"({ours:.1f}, the best other is {NAMES.get(best, best)} with {reached[best]:.1f})",
        )
    gap = difference(scores, Setting.of("aircache", 0.01), Setting.of("snapkv", 0.01))
    if gap is not None:
        yield goal(
            gap[0] >= ABOVE_SNAPKV,
            f"AirCache at 1 % at least {ABOVE_SNAPKV} points above SnapKV ({gap[0]:+.1f})",
        )


def mean_table(scores: Scores, name: str, title: str, text: str) -> Iterator[str]:
    """The mean of a number that answers may carry, by policy and retention."""
    retentions = [r for r in scores.retentions(POLICIES) if r < 1]
    lines = []
    for policy in POLICIES:
        texts = []
        for r in retentions:
            rows = scores.of(Setting.of(policy, r)).values()
            values = [row[name] for row in rows if row.get(name) is not None]
            texts.append(f"{statistics.fmean(values):.4f} ({len(values)})" if values else "-")
        if set(texts) != {"-"}:
            lines.append([NAMES.get(policy, policy), *texts])
    if lines:
        yield f"### {title}\n\n{text} In brackets the answers that have it.\n"
        yield table(["policy", *map(percent, retentions)], lines)


def with_anls(rows: Sequence[Row]) -> list[Row]:
    """Rows of our own documents with `anls` beside the exact match; answers follow from seeds."""
    answers: dict[str, str] = {}
    for kind in KINDS:
        of_kind = [row["key"]["sample"] for row in rows if row["key"]["kind"] == kind]
        numbers = [int(n) for n in (name.rpartition("-")[2] for name in of_kind) if n.isdigit()]
        questions = evaluation_set(kind, max(numbers, default=-1) + 1)
        answers |= {question.id: question.answer for question in questions}
    return [
        row | {"anls": metrics.anls(row["answer"], [answers[row["key"]["sample"]]])}
        if row["key"]["sample"] in answers
        else row
        for row in rows
    ]


def full_cache_table(rows: Sequence[Row]) -> Iterator[str]:
    """Exact match and ANLS of every sample that the full cache has answered."""
    full, lines = Setting.of(FULL), []
    for kind in dict.fromkeys(row["key"]["kind"] for row in rows):
        scores = Scores(rows, kind)
        samples = list(scores.of(full))
        near = scores.mean(full, samples, "anls")
        if near is not None:
            right = cell(scores.score(full, samples))
            lines.append([f"`{kind}`", str(len(samples)), right, cell(100 * near)])
    if lines:
        yield "### The full cache, on all that it has answered\n"
        yield table(["kind", "samples", "exact match", "ANLS"], lines)


def anls_table(scores: Scores) -> Iterator[str]:
    yield from mean_table(scores, "anls", "ANLS", "The metric of DocVQA and InfoVQA, in [0, 1].")


def divergence_table(scores: Scores) -> Iterator[str]:
    yield from mean_table(
        *(scores, "divergence", "How far the next token's distribution moves"),
        "Jensen-Shannon divergence in bits from the full cache's, over the tokens after the first "
        "until the answers part.",
    )


def mass_table(scores: Scores) -> Iterator[str]:
    yield from mean_table(
        *(scores, "visual_mass", "Attention mass"),
        "The share of the elite window's attention to the picture that the kept tokens carry.",
    )


def rank_tables(scores: Scores) -> Iterator[str]:
    """Figure 4; what still tells ranks apart where no answer is right from one token."""
    of = {p: [Setting.of(p, ONE_TOKEN, **rare(rank=k)) for k in RANKS] for p in RANKED}
    settings = [setting for row in of.values() for setting in row]
    samples = scores.common(settings)
    if not samples:
        return
    yield f"### One visual token a layer, by its rank (figure 4), {len(samples)} samples\n"
    for what, digits, name in RANK_MEASURES:
        lines = []
        for policy, row in of.items():
            figures = [
                scores.score(setting, samples)
                if name == "score"
                else scores.mean(setting, samples, name)
                for setting in row
            ]
            if any(figure is not None for figure in figures):
                lines.append([NAMES[policy], *(cell(figure, digits) for figure in figures)])
        if lines:
            yield f"{what}:\n"
            yield table(["policy", *map(str, RANKS)], lines)


def ablation_tables(scores: Scores) -> Iterator[str]:
    def settings(values: Sequence[Any], make: Callable[[Any, float], Setting]) -> Any:
        return lambda r: [(f"{value}", make(value, r)) for value in values]

    def heads(retention: float) -> Labelled:
        return [
            (
                f"elite {e}, selection {s}",
                Setting.of("aircache", retention, elite=e, **rare(selection=s)),
            )
            for e in ("per-head", "shared")
            for s in ("per-head", "shared")
        ]

    parts: list[tuple[str, str, str, Callable[[float], Labelled]]] = [
        (
            *("Observation window (table 5)", "table5", "window "),
            settings((*SHORT_WINDOWS, *WINDOWS), lambda w, r: Setting.of("aircache", r, window=w)),
        ),
        (
            *("Layer budgets (table 5)", "table5", "budget "),
            settings(ALL_BUDGETS, lambda b, r: Setting.of("aircache", r, budget=b)),
        ),
        (
            *("Even share under budgets from one threshold", "", ""),
            settings([f"{f:g}" for f in FLOORS], lambda f, r: with_floor(float(f), r)),
        ),
        (
            *("Share merged instead of dropped (table 11)", "table11", ""),
            settings([f"{m:g}" for m in MERGED], lambda m, r: merged(float(m), r)),
        ),
        (
            *("Share merged into the most similar keys", "", ""),
            settings([f"{m:g}" for m in MERGED], lambda m, r: merged(float(m), r, "similar")),
        ),
        (
            *("Width of SnapKV's pool", "", ""),
            settings(POOLS, lambda k, r: Setting.of("snapkv", r, **rare(kernel=k))),
        ),
        (
            *("Relevance threshold (table 12)", "table12", ""),
            settings(ALPHAS, lambda a, r: Setting.of("aircache", r, alpha=a)),
        ),
        ("Heads, which the paper leaves open", "", "", heads),
    ]
    for title, name, prefix, make in parts:
        yield from knob_table(scores, title, name, prefix, make)
    yield from threshold_gaps(scores)
    yield from cross_table(scores)


def threshold_gaps(scores: Scores) -> Iterator[str]:
    """Budgets from one threshold less those of eq. 11, on the samples that have both."""
    gaps = {
        r: difference(
            scores,
            Setting.of("aircache", r, budget="global"),
            Setting.of("aircache", r, budget="aircache"),
        )
        for r in scores.retentions(["aircache"])
        if r < 1
    }
    found = {r: g for r, g in gaps.items() if g is not None}
    if found:
        yield "### Budgets from one threshold less eq. 11\n"
        yield "In points, with the 95 % interval of a paired bootstrap.\n"
        yield table(list(map(percent, found)), [list(map(gap_text, found.values()))])


def knob_table(
    scores: Scores, title: str, name: str, prefix: str, make: Callable[[float], Labelled]
) -> Iterator[str]:
    """A line a value: its score where a retention has at least two values, and the paper's."""
    columns: dict[float, tuple[Labelled, list[str]]] = {}
    for r in scores.retentions(["aircache", "snapkv"]):
        labelled = make(r)
        if r < 1 and sum(scores.has(setting) for _, setting in labelled) > 1:
            columns[r] = labelled, scores.common([setting for _, setting in labelled])
    if not columns:
        return
    labels = [label for label, _ in next(iter(columns.values()))[0]]
    lines = []
    for label in labels:
        line = [label]
        for labelled, samples in columns.values():
            line.append(cell(scores.score(dict(labelled)[label], samples)))
        if name:
            ours = label in ("elite", "aircache")
            row = "aircache" if ours else prefix + label
            line += [cell(of_paper(name, row, r)) for r in LOW if paper_has(name, r)]
        lines.append(line)
    yield f"### {title}\n"
    yield ", ".join(f"{percent(r)}: {len(s)} samples" for r, (_, s) in columns.items()) + ".\n"
    head = ["", *map(percent, columns)]
    if name:
        head += [f"paper, {percent(r)}" for r in LOW if paper_has(name, r)]
    yield table(head, lines)


def paper_has(name: str, retention: float) -> bool:
    return any(f"{retention:g}" in row for row in PAPER[name].values())


def cross_table(scores: Scores) -> Iterator[str]:
    for r in scores.retentions(["aircache"]):
        cells = {
            (w, b): Setting.of("aircache", r, window=w, budget=b) for w in WINDOWS for b in BUDGETS
        }
        if not all(map(scores.has, cells.values())):
            continue
        samples = scores.common(cells.values())
        yield f"### Every window with every budget at {percent(r)}, {len(samples)} samples\n"
        lines = [[w, *(cell(scores.score(cells[w, b], samples)) for b in BUDGETS)] for w in WINDOWS]
        yield table(["window", *BUDGETS], lines)


def budget_table(scores: Scores) -> Iterator[str]:
    """Table 13, from the layer budgets that the answers report."""
    lines = []
    for one, other in (("uniform", "strength"), ("uniform", "skewness"), ("strength", "skewness")):
        line = [f"{one}, {other}"]
        for r in LOW:
            pair = [Setting.of("aircache", r, budget=name) for name in (one, other)]
            sides = [scores.of(setting) for setting in pair]
            bits = [
                metrics.jensen_shannon(sides[0][s]["layer_budgets"], sides[1][s]["layer_budgets"])
                for s in scores.common(pair)
                if all("layer_budgets" in side.get(s, {}) for side in sides)
            ]
            line += [cell(statistics.fmean(bits) if bits else None, 4)]
            line += [cell(of_paper("table13", f"{one} {other}", r), 2)]
        lines.append(line)
    if all(line[1] == line[3] == "-" for line in lines):
        return
    yield "### Divergence between layer budgets (table 13)\n"
    yield "Mean Jensen-Shannon divergence in bits of the budgets as distributions over layers.\n"
    yield table(["", *(head for r in LOW for head in (percent(r), f"paper, {percent(r)}"))], lines)


def unified_table(scores: Scores) -> Iterator[str]:
    """Table 6. The paper's seconds are of answers that grow longer; ours are counted in letters."""
    retentions = [
        r
        for r in UNIFIED_RETENTIONS
        if any(scores.has(Setting.of(p, r, **rare(audience="all"))) for p in UNIFIED)
    ]
    if not retentions:
        return
    full = Setting.of(FULL)
    asked = {
        (policy, audience): [Setting.of(policy, r, **rare(audience=audience)) for r in retentions]
        for policy in UNIFIED
        for audience in AUDIENCES
    }
    samples = scores.common([full, *(setting for row in asked.values() for setting in row)])

    def figures(setting: Setting) -> str:
        letters = cell(scores.mean(setting, samples, "letters"))
        return f"{cell(scores.score(setting, samples))} / {letters}"

    lines = []
    for (policy, audience), row in asked.items():
        paper = [PAPER["table6"][f"{policy} {audience}"][f"{r:g}"] for r in retentions]
        lines.append(
            [
                f"{NAMES[policy]}, {audience}",
                *map(figures, row),
                *(f"{of['ChartQA']:g} / {of['seconds']:g}" for of in paper),
            ]
        )
    yield f"### Evicting text too (table 6), {len(samples)} samples\n"
    yield (
        "`all`: that share of all tokens of the prompt is kept; `visual`: of the visual ones, and "
        "all text. Score / letters an answer; the paper: ChartQA's score / seconds. The full "
        f"cache: {figures(full)}.\n"
    )
    head = ["", *map(percent, retentions), *(f"paper, {percent(r)}" for r in retentions)]
    yield table(head, lines)


def pruning_table(scores: Scores) -> Iterator[str]:
    retentions = [r for r in scores.retentions(PRUNING) if r < 1]
    if not retentions:
        return
    policies = (*PRUNING, "aircache")
    settings = [Setting.of(policy, r) for policy in policies for r in retentions]
    samples = scores.common([Setting.of(FULL), *settings])
    yield f"### Token pruning (table 4), {len(samples)} samples\n"
    yield (
        "FastV, FasterVLM and the IVTP-style method drop visual tokens before or within the "
        "prefill, in Transformers: the prefill is cheaper, and its answers' first token differs "
        "too. The paper's figures are ChartQA's.\n"
    )
    head = ["", *map(percent, retentions), *(f"paper, {percent(r)}" for r in retentions)]
    lines = []
    for policy in (FULL, *policies):
        of = [Setting.of(FULL) if policy == FULL else Setting.of(policy, r) for r in retentions]
        paper = [PAPER["table4"][policy].get(f"{r:g}", {}).get("ChartQA") for r in retentions]
        figures = [scores.score(setting, samples) for setting in of]
        lines.append([NAMES[policy], *map(cell, figures), *map(cell, paper)])
    yield table(head, lines)


def checks(rows: Sequence[Row]) -> Iterator[str]:
    """What a reader must know before believing a table."""
    stray = [
        row
        for row in rows
        if row["key"]["setting"]["policy"] in POLICIES
        and row["key"]["setting"]["retention"] < 1
        and "columns" not in row
    ]
    if stray:
        yield f"**{len(stray)} answers were to be compressed and were not.**\n"


def curve(path: Path, name: str, scores: Scores, metric: str) -> Iterator[Path]:
    """Score over what is held, a line a policy, on the samples of the first table."""
    retentions = [r for r in scores.retentions(POLICIES) if r < 1]
    asked = contestants(retentions)
    samples = scores.common(setting for line in asked.values() for setting in line)
    del asked[FULL]  # a level, not a line
    lines: dict[str, list[tuple[float, float | None]]] = {}
    ranges: dict[str, list[tuple[float, float]]] = {}
    for line, settings in asked.items():
        answered = [s for s in settings if samples and scores.of(s).keys() >= {*samples}]
        if len(answered) > 1:
            lines[line] = [(s.retention, scores.score(s, samples)) for s in answered]
            if metric != "yes_no":  # MME's figure is a sum over tasks
                ranges[line] = [interval(scores, s, samples) for s in answered]
    if lines:
        label = "share of the visual KV that is held: columns over visual tokens"
        picture = path.with_name(f"{path.stem}-{name}.png")
        level = scores.score(Setting.of(FULL), samples)
        height = f"{metric.replace('_', ' ')}, {len(samples)} samples"
        yield plot(*(picture, lines, label), height=height, full=level, falling=True, ranges=ranges)


def ranks(path: Path, name: str, scores: Scores) -> Iterator[Path]:
    """Tokens in common with the full cache over the rank of the one that is kept."""
    settings = {p: [Setting.of(p, ONE_TOKEN, **rare(rank=k)) for k in RANKS] for p in RANKED}
    samples = scores.common(setting for row in settings.values() for setting in row)
    lines = {
        policy: [
            (rank + 1, scores.mean(setting, samples, "same"))
            for rank, setting in zip(RANKS, row, strict=True)
            if scores.has(setting)
        ]
        for policy, row in settings.items()
        if any(scores.mean(setting, samples, "same") is not None for setting in row)
    }
    if lines:
        picture = path.with_name(f"{path.stem}-{name}-ranks.png")
        yield plot(
            *(picture, lines, "rank of the one token a layer that is kept"),
            height="tokens in common with the full cache",
        )


def plot(
    picture: Path,
    lines: dict[str, list[tuple[float, float | None]]],
    label: str,
    *,
    height: str = "score",
    full: float | None = None,
    falling: bool = False,
    ranges: Mapping[str, Sequence[tuple[float, float]]] = MappingProxyType({}),
) -> Path:
    """Lines over a logarithmic axis, the ranges of their points, and the full cache's level."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator

    figure, axis = pyplot.subplots(figsize=(8, 4.2))
    if full is not None:
        axis.axhline(full, color="black", linestyle="--", label=NAMES[FULL])
    # The dark ones first; red is ours.
    twenty = pyplot.get_cmap("tab20")
    colours = iter([twenty(i) for i in (*range(0, 20, 2), *range(1, 20, 2)) if i not in (6, 7)])
    for policy in sorted(lines, key=lambda policy: -sum(y or 0 for _, y in lines[policy])):
        ours = policy == "aircache"
        style: dict[str, Any] = {"lw": 3, "ms": 7, "color": "C3", "zorder": 3} if ours else {}
        style = style or {"lw": 1.2, "ms": 4, "color": next(colours)}
        xs, ys = zip(*lines[policy], strict=True)
        axis.plot(xs, ys, "o-", label=NAMES.get(policy, policy), **style)
        if policy in ranges:
            lows, highs = zip(*ranges[policy], strict=True)
            axis.fill_between(xs, lows, highs, color=style["color"], alpha=0.12, lw=0)
    axis.set_xscale("log")
    marks = sorted({x for points in lines.values() for x, _ in points})
    axis.set_xticks(marks, [percent(x) if falling else f"{x:g}" for x in marks], minor=False)
    axis.xaxis.set_minor_locator(NullLocator())
    if falling:
        axis.invert_xaxis()
    axis.set_xlabel(label)
    axis.set_ylabel(height)
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
    return picture


def header(path: Path, runs: Sequence[Row], rows: Sequence[Row]) -> str:
    names = ("model", "weights", "version", "sglang", "torch", "device", "git", "command")
    used = {row["run"] for row in rows}
    seen = [run for run in runs if run["run"] in used]
    lines = [f"{len(rows)} answers in `{path_label(stored(path.resolve()))}`.\n"]
    for name in names:
        values = "; ".join(dict.fromkeys(str(run[name]) for run in seen))
        lines.append(f"- {name}: {values}")
    return "\n".join(lines) + "\n"


def sections(path: Path, page: Path) -> Iterator[str]:
    runs, rows = read(path)
    rows = [row for row in rows if current(row["key"]["setting"])]
    yield header(path, runs, rows)
    for name in dict.fromkeys(row["key"]["dataset"] for row in rows):
        of_set = [
            row | {"letters": len(row["answer"])} for row in rows if row["key"]["dataset"] == name
        ]
        if name == "ours":
            of_set = with_anls(of_set)
        scores = Scores(of_set)
        metric = ", ".join(sorted({row["metric"] for row in of_set}))
        yield f"## Data set `{name}`, {metric}\n"
        yield from checks(of_set)
        yield from policy_tables(scores, of_set)
        yield from full_cache_table(of_set)
        for picture in (*curve(path, name, scores, metric), *ranks(path, name, scores)):
            yield f"![{picture.stem}]({os.path.relpath(picture, page.parent)})\n"
        yield from ablation_tables(scores)
        yield from unified_table(scores)
        yield from rank_tables(scores)
        yield from anls_table(scores)
        yield from divergence_table(scores)
        yield from mass_table(scores)
        yield from budget_table(scores)
        yield from pruning_table(scores)


def report(path: Path, page: Path = PAGE) -> None:
    """Write the tables between the marks of `page`, the plots beside `path`, and print the tables.

    Raises:
        ValueError: no results, or a page without the marks.
    """
    if not stored(path).is_file():
        raise ValueError(f"no results in {path}: run first")
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} must have {BEGIN} and, after it, {END}")
    text = "\n".join(sections(path, page))
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")
    print(text)
