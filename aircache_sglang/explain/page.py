# SPDX-License-Identifier: Apache-2.0
"""The comparison as data, as one HTML file, and as a still picture."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image, ImageChops, ImageDraw

from aircache_sglang.explain.client import Answer, Token, first_difference
from aircache_sglang.explain.geometry import Panel

TEMPLATE = Path(__file__).with_name("page.html.jinja")
LONGEST = 1600  # pixels of a picture's longer side in the page
MARKER = "#ffd24d"


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One answer on compressed KV; its report holds the selection."""

    policy: str
    retention: float
    answer: Answer

    @property
    def name(self) -> str:
        return f"{self.policy}, retention {self.retention:g}"

    @property
    def report(self) -> dict[str, Any]:
        if self.answer.report is None:
            raise ValueError(f"{self.name}: the server left it alone, {self.answer.reason}")
        return self.answer.report


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """What the page shows.

    pictures: each with its name; frames of videos behind the images.
    panels: where the tokens lie; empty where `unplaced` says why they cannot be placed.
    strip: whether the pictures are frames, to be shown side by side.
    """

    question: str
    model: str
    url: str
    full: Answer
    runs: tuple[Run, ...]
    pictures: tuple[tuple[str, Image.Image], ...]
    panels: tuple[Panel, ...]
    unplaced: str | None
    strip: bool

    @property
    def n_visual(self) -> int:
        return int(self.runs[0].report["visual_tokens"])


def data_of(comparison: Comparison) -> dict[str, Any]:
    """Everything but the pixels, for `--json`; boxes are shares of a picture's sides."""
    panels, first = [], 0
    for panel in comparison.panels:
        name = comparison.pictures[panel.picture][0]
        panels.append(
            {
                "picture": panel.picture,
                "name": f"{name}, {panel.view}" if panel.view else name,
                "first": first,
                "boxes": [box and [round(share, 5) for share in box] for box in panel.boxes],
                "separators": panel.boxes.count(None),
            }
        )
        first += len(panel.boxes)
    return {
        "question": comparison.question,
        "model": comparison.model,
        "url": comparison.url,
        "n_visual": comparison.n_visual,
        "pictures": [
            {"name": name, "width": picture.width, "height": picture.height}
            for name, picture in comparison.pictures
        ],
        "panels": panels,
        "unplaced": comparison.unplaced,
        "strip": comparison.strip,
        "full": _answer(comparison.full),
        "runs": [
            {
                "name": run.name,
                "policy": run.policy,
                "retention": run.retention,
                "report": run.report,
                "first_difference": first_difference(comparison.full.tokens, run.answer.tokens),
                **_answer(run.answer),
            }
            for run in comparison.runs
        ],
    }


def _answer(answer: Answer) -> dict[str, Any]:
    tokens = [dataclasses.asdict(token) for token in answer.tokens]
    return {"text": answer.text, "tokens": tokens}


def html_of(comparison: Comparison) -> str:
    """The page; it holds all that it shows and asks for nothing."""
    data = data_of(comparison)
    for described, run in zip(data["runs"], comparison.runs, strict=True):
        left, right = comparison.full.tokens, run.answer.tokens
        described["steps"] = list(itertools.zip_longest(left, right))
        described["crossed"] = crossed(left, right, run.name)
    pictures = []
    for described, (_, picture) in zip(data["pictures"], comparison.pictures, strict=True):
        shown = picture.convert("RGB")
        shown.thumbnail((LONGEST, LONGEST))
        size = {"width": shown.width, "height": shown.height}
        pictures.append({**described, **size, "src": _png_url(shown)})
    page = {
        "n_visual": data["n_visual"],
        "pictures": pictures,
        "panels": data["panels"],
        "runs": [
            {"selection": run.report["selection"], "budgets": run.report["layer_budgets"]}
            for run in comparison.runs
        ],
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(TEMPLATE.read_text()).render(data=data, page=page)


def crossed(left: Sequence[Token], right: Sequence[Token], name: str) -> str | None:
    """At the first difference both see the same words: what each thought of the other's token."""
    step = first_difference(left, right)
    if step is None or step >= min(len(left), len(right)):
        return None
    said = []
    for who, mine, other in (("full cache", left, right), (name, right, left)):
        token = other[step].text
        logprob = mine[step].others.get(token)
        figure = "less than its five likeliest" if logprob is None else f"{logprob:.4f}"
        said.append(f"{who} gave {token!r} {figure}")
    return " and ".join(said)


def _png_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def still_of(comparison: Comparison, width: int = 560) -> Image.Image:
    """Each panel once per run, a row a run: the more layers and heads keep a token, the darker."""
    gap, header = 16, 28
    views = []
    for panel in comparison.panels:
        picture = comparison.pictures[panel.picture][1].convert("RGB")
        scale = width / picture.width
        views.append(picture.resize((width, max(1, round(picture.height * scale)))))
    tallest = max(view.height for view in views)
    row = header + tallest + gap
    size = (gap + len(views) * (width + gap), gap + len(comparison.runs) * row)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, run in enumerate(comparison.runs):
        top = gap + number * row
        kept = f"{run.report['columns']} of {comparison.n_visual} slots held"
        draw.text((gap, top), f"{run.name}: {kept}; darker: kept by more", "black", font_size=18)
        heads = [head for layer in run.report["selection"] for head in layer]
        counts = Counter(ordinal for head in heads for ordinal in head)
        most, first = max(counts.values()), 0
        for place, (panel, view) in enumerate(zip(comparison.panels, views, strict=True)):
            left = gap + place * (width + gap)
            shown = Image.blend(view, Image.new("RGB", view.size, "white"), 0.85)
            for ordinal, box in enumerate(panel.boxes, first):
                if box is None or not counts[ordinal]:
                    continue
                x, y = round(box[0] * view.width), round(box[1] * view.height)
                area = (x, y, round(box[2] * view.width), round(box[3] * view.height))
                cut = view.crop(area)
                marked = ImageChops.multiply(cut, Image.new("RGB", cut.size, MARKER))
                shown.paste(Image.blend(shown.crop(area), marked, counts[ordinal] / most), area)
            first += len(panel.boxes)
            sheet.paste(shown, (left, top + header))
    return sheet.quantize(128)
