# SPDX-License-Identifier: Apache-2.0
"""Requests that stock SGLang does not survive end in a sentence, or are answered (Qwen2-VL).

The other families' are in test_families.py, beside their servers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from aircache_sglang.testing import Server
from aircache_sglang.testing.checkpoints import make_qwen2_vl, make_qwen3_vl
from aircache_sglang.testing.oracle import Oracle
from aircache_sglang.testing.prompts import PICTURE, ask, picture, user_prompt
from aircache_sglang.testing.server import png_data_url
from tests.integration.storm import loads, wait_idle
from tests.support import bad_requests
from tests.support.bad_requests import assert_all_end_well
from tests.support.families import Family
from tests.support.families.qwen import QWEN_IMAGE, QWEN_VIDEO, QWEN_WORDS, QwenReader

pytestmark = pytest.mark.server

ROOT = Path(__file__).resolve().parents[2]
QWEN2_VL = Family(make_qwen2_vl, QWEN_IMAGE, QWEN_VIDEO, QwenReader, QWEN_WORDS)
QUESTION = bad_requests.QUESTION


def test_no_request_ends_the_server(aircache_server: Server) -> None:
    assert_all_end_well(aircache_server, QWEN2_VL)


def test_an_expanded_prompt_is_answered(aircache_server: Server, oracle: Oracle) -> None:
    """The ids of Transformers' processor, which SGLang would expand once more."""
    prompt = user_prompt(picture(1, 10, 10), "and", picture(2, 9, 11), QUESTION)
    ids = oracle.inputs(prompt)["input_ids"][0].tolist()
    expected = ask(aircache_server, prompt, {"retention": 0.3})
    for request in ({"input_ids": ids}, {"text": oracle.processor.tokenizer.decode(ids)}):
        fields = {"sampling": {"custom_params": {"aircache": {"retention": 0.3}}}}
        fields["sampling"]["ignore_eos"] = True
        answer = aircache_server.generate(**request, images=prompt.images, **fields)
        assert answer["output_ids"] == expected["output_ids"]
        assert answer["meta_info"]["prompt_tokens"] == len(ids)
    wrong = [token for index, token in enumerate(ids) if index != ids.index(ids[20], 20)]
    status, said = bad_requests.post(
        aircache_server,
        {"input_ids": wrong, "image_data": [png_data_url(image) for image in prompt.images]},
    )
    assert status == 400 and "write it once" in bad_requests.sentence_of(said)


CHATS: dict[str, list[dict[str, Any]]] = {
    "user": [{"role": "user", "content": "what is <|image_pad|>?"}],
    "user, the whole mark": [{"role": "user", "content": f"what is {PICTURE}?"}],
    "system": [{"role": "system", "content": "you know <|image_pad|>."}],
    "assistant": [
        {"role": "user", "content": "what do you see?"},
        {"role": "assistant", "content": "a <|image_pad|>, I think"},
    ],
    "tool": [
        {"role": "user", "content": "look it up"},
        {"role": "tool", "tool_call_id": "1", "content": "it is called <|image_pad|>"},
    ],
    "a video's": [{"role": "user", "content": "what is <|video_pad|>?"}],
}


@pytest.mark.parametrize("name", CHATS)
def test_chats(aircache_server: Server, name: str) -> None:
    """Beside a real picture; without one the same words are text."""
    url = {"type": "image_url", "image_url": {"url": png_data_url(picture(1, 10, 10))}}
    seen = {"role": "user", "content": [url, {"type": "text", "text": QUESTION}]}
    body = {"model": "m", "max_tokens": 2, "messages": [*CHATS[name], seen]}
    status, answer = bad_requests.post(aircache_server, body, "/v1/chat/completions")
    assert status == 400, answer
    said = bad_requests.sentence_of(answer)
    assert "the prompt speaks of" in said and "\n" not in said
    body["messages"] = [*CHATS[name], {"role": "user", "content": QUESTION}]
    status, answer = bad_requests.post(aircache_server, body, "/v1/chat/completions")
    assert status == 200, answer


def test_a_stream_and_a_batch(aircache_server: Server) -> None:
    """Good requests of a batch with a bad one do not hang, and leave nothing behind."""
    bad = bad_requests.refused(QWEN2_VL)["the text says the token"]
    good = bad_requests.body(QWEN2_VL, [PICTURE, QUESTION], images=bad["image_data"])
    response = aircache_server.request("POST", "/generate", {**bad, "stream": True})
    [error] = [line for line in response.text.splitlines() if '"error"' in line]
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == 400
    batch = {
        "text": [good["text"], bad["text"], good["text"]],
        "image_data": [good["image_data"]] * 3,
        "sampling_params": good["sampling_params"],
    }
    status, answer = bad_requests.post(aircache_server, batch)
    assert status == 400 and "the prompt speaks of" in bad_requests.sentence_of(answer)
    status, _ = bad_requests.post(aircache_server, good)
    assert status == 200
    wait_idle(aircache_server)


def test_bad_ones_among_good_ones(aircache_server: Server) -> None:
    """Many at once: every good one is answered as alone."""
    bad = list(bad_requests.refused(QWEN2_VL).values())
    good = [
        bad_requests.body(QWEN2_VL, [PICTURE, QUESTION], images=[png_data_url(picture(seed))])
        for seed in range(4)
    ]
    expected = [bad_requests.post(aircache_server, data) for data in good]
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda data: bad_requests.post(aircache_server, data), bad)
        found = pool.map(lambda data: bad_requests.post(aircache_server, data), good)
        assert {status for status, _ in answers} == {400}
        for (status, answer), (_, alone) in zip(found, expected, strict=True):
            assert status == 200 and answer["output_ids"] == alone["output_ids"]
    wait_idle(aircache_server)
    aircache_server.flush_cache()
    assert loads(aircache_server)["num_used_tokens"] == 0


@pytest.mark.parametrize("make", [make_qwen2_vl, make_qwen3_vl])
def test_embeddings_and_processor_outputs(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """Through the engine, since HTTP carries no tensors."""
    result = subprocess.run(
        [
            *(sys.executable, "-m", "tests.support.embeddings"),
            *(str(make(tmp_path / "model")), "aircache"),
        ],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    expected = rows[0]
    assert expected["name"] == "good" and expected["report"]["slots_freed"] > 50
    assert len(rows) > 15
    for row in rows[1:]:
        assert row["alive"], row
        if row["name"].startswith("wrong"):
            assert "\n" not in row["refused"] and len(row["refused"]) < 300, row
        else:
            assert row["output_ids"] == expected["output_ids"], row
            assert row["report"]["layer_budgets"] == expected["report"]["layer_budgets"], row
