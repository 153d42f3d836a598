# SPDX-License-Identifier: Apache-2.0
"""Stock SGLang, with no flag beyond a model, serves text and pictures on a plain CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing import Server
from aircache_sglang.testing.checkpoints import make_qwen2_vl

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("platform")
    checkpoint: Path = make_qwen2_vl(folder / "model")
    # The platform itself has to disable compilation, not the environment of the tests.
    env = {"TORCHDYNAMO_DISABLE": None}
    with Server(
        checkpoint, ["--enable-cache-report"], env=env, log=folder / "server.log"
    ) as server:
        yield server


def picture(seed: int) -> Image.Image:
    """224 x 280 pixels, 80 visual tokens."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((280, 224))


def test_resolved_arguments(server: Server) -> None:
    info = server.info()
    assert info["device"] == "cpu"
    assert info["attention_backend"] == "torch_native"
    assert info["sampling_backend"] == "pytorch"
    assert info["max_total_num_tokens"] == 65_536
    for phase in ("decode", "prefill"):
        assert info["cuda_graph_config"][phase]["backend"] == "disabled"


def test_text(server: Server) -> None:
    answer = server.chat("what is above the house?", max_tokens=12)
    assert answer["usage"]["completion_tokens"] == 12
    assert len(answer["choices"][0]["message"]["content"].split()) == 12


def test_picture_and_prefix_hit(server: Server) -> None:
    server.flush_cache()
    first = server.chat("what is in the picture?", images=[picture(0)])
    again = server.chat("what is in the picture?", images=[picture(0)])
    other = server.chat("what is in the picture?", images=[picture(1)])
    details = [answer["usage"]["prompt_tokens_details"] for answer in (first, again, other)]
    assert [detail["image_tokens"] for detail in details] == [80, 80, 80]
    # A full hit recomputes the last token only; another picture shares only the text before it.
    prompt = first["usage"]["prompt_tokens"]
    assert details[1]["cached_tokens"] == prompt - 1
    assert details[0]["cached_tokens"] == 0
    assert 0 < details[2]["cached_tokens"] < prompt - 80
    texts = [answer["choices"][0]["message"]["content"] for answer in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]


def test_structured_output(server: Server) -> None:
    schema = {"type": "string", "enum": ["green", "yellow"]}
    answer = server.chat(
        "which color?",
        response_format={"type": "json_schema", "json_schema": {"name": "color", "schema": schema}},
    )
    assert answer["choices"][0]["message"]["content"] in ('"green"', '"yellow"')
