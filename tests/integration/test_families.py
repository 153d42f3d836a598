# SPDX-License-Identifier: Apache-2.0
"""Every model family on a server that compresses: Transformers' answers, in short.

What a family counts as visual is checked through the oracle: budgets, selection and every logprob
depend on which tokens are visual and on where the instruction begins. Beside stock SGLang, and in
all shapes, the families are tested by `make test-families` (test_family_matrix.py).
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aircache_patches.cli import main as aircache
from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing import Server, ServerError
from aircache_sglang.testing.oracle import Oracle, assert_agrees, assert_policy_agrees
from aircache_sglang.testing.prompts import ask, picture, user_prompt
from tests.integration.conftest import COMMON_FLAGS, STRICT_MEMORY_CHECKS
from tests.support.bad_requests import assert_all_end_well
from tests.support.browser import Browser, find_chromium
from tests.support.families import FAMILIES, make_sound, make_video
from tests.support.families.served import (
    CHUNKS,
    QUESTION,
    STAND_INS,
    Served,
    conversations,
    serve,
)

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
    pytest.mark.timeout(600),
]

ROOT = Path(__file__).parents[2]
# The mean of each picture of the page, before anything is drawn on it.
FRAME_COLOURS = """images.map(image => {
  const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1});
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data];
})"""
SHAPES = ("text between", "picture, video, text", "picture, sound, text")


@pytest.fixture(scope="module", params=FAMILIES)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("family")
    with serve(FAMILIES[request.param], folder) as served:
        yield served


def test_transformers_agrees(served: Served) -> None:
    for name in SHAPES:
        if name in served.prompts:
            prompt = served.prompts[name]
            if served.reader is not None:
                assert_agrees(served.reader, prompt, served.ask(prompt, retention=1))
            for retention in (0.3, 0.05):
                served.check(prompt, retention)


@pytest.mark.parametrize("served", ["qwen2.5-vl", "qwen3-vl"], indirect=True)
def test_explain_shows_the_frames_of_a_video(served: Served, tmp_path: Path) -> None:
    """A picture and a strip of steps, each with its own tokens, in a real Chromium."""
    find_chromium()
    make_video(tmp_path / "clip.mp4", 3)
    picture(5, 8, 9).save(tmp_path / "still.png")
    argv = [sys.executable, "-m", "aircache_patches.cli", "explain", "--url", served.server.url]
    argv += ["--image", "still.png", "--video", "clip.mp4", "--ask", "what is it?"]
    argv += ["--retention", "0.3", "--max-tokens", "4", "-o", "page.html", "--json", "data.json"]
    # The decoder that the server has, too.
    env = os.environ | {"PYTHONPATH": f"{STAND_INS}{os.pathsep}{ROOT}"}
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr

    data = json.loads((tmp_path / "data.json").read_text())
    assert data["strip"] and data["unplaced"] is None
    still, *steps = [len(panel["boxes"]) for panel in data["panels"]]
    assert len(steps) > 1 and len(set(steps)) == 1 and still + sum(steps) == data["n_visual"]
    names = [panel["name"] for panel in data["panels"]]
    assert names[:2] == ["still.png", "clip.mp4, frames 1 to 2"]
    kept = {i for layer in data["runs"][0]["report"]["selection"] for head in layer for i in head}
    counts = [
        sum(panel["first"] <= i < panel["first"] + len(panel["boxes"]) for i in kept)
        for panel in data["panels"]
    ]
    assert sum(counts) == len(kept) and all(counts)
    with Browser(tmp_path / "profile") as browser:
        browser.resize(1100, 900)
        browser.open(tmp_path / "page.html")
        captions = browser.evaluate(
            "[...document.querySelectorAll('#panels.strip figcaption')].map(e => e.textContent)"
        )
        shown = zip(names, counts, [still, *steps], strict=True)
        assert captions == [f"{name}: {n} of {of} tokens kept" for name, n, of in shown]
        colours = browser.evaluate(FRAME_COLOURS)
        assert len(set(map(tuple, colours))) == len(captions), "each shows its own frame"
        assert browser.evaluate("document.documentElement.scrollWidth") == 1100
        assert browser.errors == []


def test_no_request_ends_the_server(served: Served, tmp_path: Path) -> None:
    """What stock SGLang does not survive; Qwen2-VL's and more are in test_bad_requests.py."""
    video = None if served.family.video is None else make_video(tmp_path / "video.png", 3)
    sound = None if served.family.sound is None else make_sound(tmp_path / "sound.wav", 3)
    assert_all_end_well(served.server, served.family, video, sound)


def test_no_slot_is_lost(served: Served) -> None:
    served.assert_no_slot_is_lost()


@pytest.fixture(scope="module")
def replicas(checkpoint: Path) -> Iterator[Server]:
    """Two data-parallel Qwen2-VL of a short context, to which prompts are cut."""
    flags = [
        *(*COMMON_FLAGS, "--kv-policy", "aircache", "--aircache-gate", "off"),
        *("--enable-metrics", "--dp-size", "2"),
        *("--context-length", "400", "--allow-auto-truncate"),
    ]
    with Server(checkpoint, flags, env=STRICT_MEMORY_CHECKS) as server:
        yield server


def test_data_parallel_replicas(
    replicas: Server, oracle: Oracle, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [user_prompt(picture(seed, 9, 9), QUESTION) for seed in range(6)]
    overrides = {"retention": 0.1, "return_selection": True}
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda prompt: ask(replicas, prompt, overrides), prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["meta_info"]["aircache"]["visual_tokens"] == 81
        assert_agrees(oracle, prompt, answer)
    found = counts(replicas, "requests_compressed_total")
    assert {rank for rank, _ in found} == {"0", "1"} and sum(n for _, n in found) == len(prompts)
    capsys.readouterr()
    assert aircache(["cache", "--url", replicas.url]) == 0
    trees = capsys.readouterr().out.split("\n\n")
    for rank, tree in enumerate(trees):
        assert tree.startswith(f"{replicas.url}, data-parallel rank {rank}\npool ")
        assert "visual" in tree
    assert len(trees) == 2


def test_a_prompt_cut_through_a_picture_is_refused(replicas: Server, oracle: Oracle) -> None:
    """By SGLang itself, whose limit for prompts with pictures is below the length it cuts to."""
    prompt = user_prompt("look:", picture(1, 14, 14), "and", picture(2, 16, 16), QUESTION)
    before = counts(replicas, "requests_compressed_total")
    with pytest.raises(ServerError, match=r"HTTP 400.*Multimodal prompt is too long"):
        ask(replicas, prompt, {"retention": 0.1})
    assert counts(replicas, "requests_compressed_total") == before
    prompt = user_prompt(picture(7, 9, 9), QUESTION)
    assert_agrees(oracle, prompt, ask(replicas, prompt, {"return_selection": True}))


def counts(server: Server, name: str, label: str = "dp_rank") -> list[tuple[str, float]]:
    """Values of one of our counters by a label."""
    return [
        (labels[label], value)
        for sample, labels, value in server.metric_samples()
        if sample == f"sglang:aircache_{name}" and value
    ]


def test_two_tensor_parallel_ranks_of_qwen3_vl(tmp_path: Path) -> None:
    family = FAMILIES["qwen3-vl"]
    checkpoint = family.make(tmp_path / "model")
    prompts = conversations(dataclasses.replace(family, video=None), tmp_path)
    flags = [*COMMON_FLAGS, *CHUNKS, "--kv-policy", "aircache", "--aircache-gate", "off"]
    flags += ["--tp-size", "2"]
    assert family.reader is not None
    reader = family.reader(checkpoint)
    with Server(checkpoint, flags, env=STRICT_MEMORY_CHECKS) as server:
        for name in ("text between", "several turns"):
            prompt = prompts[name]
            answer = ask(server, prompt, {"retention": 0.1, "return_selection": True})
            trace = assert_agrees(reader, prompt, answer)
            assert_policy_agrees(trace, answer["meta_info"]["aircache"])
