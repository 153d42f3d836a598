# SPDX-License-Identifier: Apache-2.0
"""`aircache explain` against real servers; its page in a real Chromium."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from aircache_patches.cli import main
from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing import Server
from aircache_sglang.testing.prompts import picture
from tests.support.browser import Browser, find_chromium

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
    pytest.mark.timeout(900),
]

LAYERS, HEADS, N_VISUAL = 4, 2, 100 + 96


@pytest.fixture(scope="module")
def files(aircache_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the page on two pictures, its data, and the still picture."""
    folder = tmp_path_factory.mktemp("explain")
    images = []
    for seed, shape in ((1, (10, 10)), (2, (8, 12))):
        picture(seed, *shape).save(folder / f"{seed}.png")
        images += ["--image", str(folder / f"{seed}.png")]
    code = main(
        [
            *("explain", "--url", aircache_server.url, *images, "--ask", "what is </script> it?"),
            *("--retention", "0.1,0.02", "--compare", "snapkv,random", "--max-tokens", "12"),
            *("-o", str(folder / "page.html"), "--json", str(folder / "data.json")),
            *("--png", str(folder / "still.png")),
        ]
    )
    assert code == 0
    return folder


@pytest.fixture(scope="module")
def data(files: Path) -> dict[str, Any]:
    return dict(json.loads((files / "data.json").read_text()))


@pytest.fixture
def browser(files: Path, tmp_path: Path) -> Iterator[Browser]:
    find_chromium()
    with Browser(tmp_path) as browser:
        browser.resize(1100, 1000)
        browser.open(files / "page.html")
        yield browser
        assert browser.errors == []


def test_the_data_are_those_of_the_answers(data: dict[str, Any], files: Path) -> None:
    assert data["n_visual"] == N_VISUAL and data["unplaced"] is None
    assert [(p["first"], len(p["boxes"])) for p in data["panels"]] == [(0, 100), (100, 96)]
    names = [(run["policy"], run["retention"]) for run in data["runs"]]
    policies = ("aircache", "snapkv", "random")
    assert names == [(policy, share) for policy in policies for share in (0.1, 0.02)]
    for run in data["runs"]:
        report = run["report"]
        assert report["columns"] == round(run["retention"] * N_VISUAL)
        kept = [{len(head) for head in layer} for layer in report["selection"]]
        assert kept == [{budget} for budget in report["layer_budgets"]]
        assert len(run["tokens"]) == len(data["full"]["tokens"]) == 12
        step = run["first_difference"]
        texts = [[t["text"] for t in answer["tokens"]] for answer in (data["full"], run)]
        assert texts[0][:step] == texts[1][:step]
        assert step is None or texts[0][step] != texts[1][step]
    with Image.open(files / "still.png") as still:
        assert still.width > 2 * 560 and still.height > len(names) * 280


def test_the_slider_shows_each_layer(browser: Browser, data: dict[str, Any]) -> None:
    selection = data["runs"][0]["report"]["selection"]
    any_layer = {i for layer in selection for head in layer for i in head}
    said = "document.getElementById('summary').textContent"
    assert browser.evaluate(said).startswith(f"All layers, any KV head: {len(any_layer)} of 196 ")
    browser.evaluate("document.getElementById('layer').focus()")
    browser.press(["ArrowRight"])
    seen = []
    for layer in range(1, LAYERS):
        heads = selection[layer]
        count = len({i for head in heads for i in head})
        text = browser.evaluate(said)
        assert text == f"Layer {layer}, any KV head: {count} of 196 visual tokens kept"
        listed = browser.evaluate("document.getElementById('ordinals').textContent")
        assert listed == ", ".join(map(str, sorted({i for head in heads for i in head})))
        seen.append(listed)
        browser.press(["ArrowRight"])
    assert len(set(seen)) > 1
    choose = "const e = document.getElementById('head'); e.value = '1'; "
    browser.evaluate(f"{{ {choose} e.dispatchEvent(new Event('input')); }}")
    text = browser.evaluate(said)
    assert text == (
        f"Layer {LAYERS - 1}, KV head 1: {len(selection[-1][1])} of 196 visual tokens kept"
    )
    labels = browser.evaluate(
        "[...document.querySelectorAll('canvas')].map(e => e.getAttribute('aria-label'))"
    )
    per_picture = [sum(i < 100 for i in selection[-1][1]), sum(i >= 100 for i in selection[-1][1])]
    assert [label.split(": ")[1].split(" of ")[0] for label in labels] == list(
        map(str, per_picture)
    )


def test_kept_tokens_are_bright_and_dropped_ones_are_not(
    browser: Browser, data: dict[str, Any]
) -> None:
    """Pixels of the first picture at one layer: a dropped token is nearly the page's white."""
    browser.evaluate("document.getElementById('layer').focus()")
    browser.press(["ArrowRight"])
    kept = {i for head in data["runs"][0]["report"]["selection"][1] for i in head}
    pixels = browser.evaluate(
        "(() => { const c = document.querySelector('canvas'), x = c.getContext('2d'); "
        "return data.panels[0].boxes.map(b => [...x.getImageData("
        "(b[0] + b[2]) / 2 * c.width, (b[1] + b[3]) / 2 * c.height, 1, 1).data]) })()"
    )
    assert kept & set(range(100))
    for ordinal, (red, green, blue, _) in enumerate(pixels):
        if ordinal not in kept:
            assert min(red, green, blue) > 200
    assert any(min(pixels[i][:3]) < 200 for i in kept if i < 100)


def test_budgets_slots_and_logprobs(browser: Browser, data: dict[str, Any]) -> None:
    shown = browser.evaluate(
        "[...document.querySelectorAll('#budgets > span:nth-child(3n)')].map(e => +e.textContent)"
    )
    assert shown == data["runs"][0]["report"]["layer_budgets"]
    rows = browser.evaluate(
        "[...document.querySelector('table').querySelectorAll('tbody tr')]"
        ".map(r => [...r.cells].map(c => c.textContent))"
    )
    for row, run in zip(rows[1:], data["runs"], strict=True):
        assert row[0] == run["name"]
        report = run["report"]
        assert list(map(int, row[1:4])) == [196, report["columns"], report["slots_freed"]]
    steps = browser.evaluate(
        "[...document.querySelector('details[open] table').querySelectorAll('tbody tr')]"
        ".map(r => [r.cells[2].textContent, r.cells[4].textContent])"
    )
    both = zip(data["full"]["tokens"], data["runs"][0]["tokens"], strict=True)
    assert steps == [[f"{left['logprob']:.4f}", f"{right['logprob']:.4f}"] for left, right in both]
    marked = browser.evaluate("document.querySelectorAll('mark').length")
    assert marked == 2 * sum(run["first_difference"] is not None for run in data["runs"]) > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(browser: Browser, files: Path, scheme: str) -> None:
    browser.resize(390, 800)
    browser.prefer(scheme)
    browser.open(files / "page.html")
    assert browser.evaluate("document.documentElement.scrollWidth") == 390
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}[scheme]
    unnamed = browser.evaluate("document.querySelectorAll('canvas:not([aria-label])').length")
    assert unnamed == 0


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> str:
    page = tmp_path / "page.html"
    assert main(["explain", "--ask", "what?", "-o", str(page), *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and not page.exists()
    assert said.err.count("\n") == 1 and said.err.startswith("aircache explain: ")
    return said.err.removeprefix("aircache explain: ").rstrip()


def test_what_the_server_refuses_is_a_sentence(
    aircache_server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = ("--url", aircache_server.url)
    Image.new("RGB", (2000, 4)).save(tmp_path / "thin.png")
    said = refused(capsys, tmp_path, *url, "--image", str(tmp_path / "thin.png"))
    assert said.startswith("the server refused, HTTP 400: ")
    picture(1).save(tmp_path / "good.png")
    good = ("--image", str(tmp_path / "good.png"))
    said = refused(capsys, tmp_path, *url, *good, "--compare", "nosuch")
    assert said.startswith("the server refused, HTTP 400: ") and "nosuch" in said


def test_a_server_without_the_flag(
    stock_server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(1).save(tmp_path / "good.png")
    said = refused(
        *(capsys, tmp_path, "--url", stock_server.url, "--image", str(tmp_path / "good.png"))
    )
    assert said == f"{stock_server.url} runs without --kv-policy, so it drops nothing"


def test_without_the_checkpoint_the_page_shows_ordinals(
    aircache_server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(1).save(tmp_path / "good.png")
    page = tmp_path / "page.html"
    arguments = ["--url", aircache_server.url, "--image", str(tmp_path / "good.png"), "--ask", "?"]
    arguments += ["--model-path", str(tmp_path / "nowhere"), "-o", str(page)]
    assert main(["explain", *arguments]) == 0
    said = capsys.readouterr()
    assert said.out == f"{page}\n"
    assert "the tokens cannot be placed on the picture" in said.err and "--model-path" in said.err
    find_chromium()
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        assert browser.evaluate("document.querySelectorAll('canvas').length") == 0
        assert browser.evaluate("document.getElementById('ordinals').textContent").count(",") > 5
        assert "cannot be placed" in browser.evaluate(
            "document.getElementById('unplaced').textContent"
        )
        assert browser.errors == []
