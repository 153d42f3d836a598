# SPDX-License-Identifier: Apache-2.0
"""Requests that stock SGLang 0.5.23 does not survive, and their kin, for every family of models."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

from aircache_sglang.testing import Server
from aircache_sglang.testing.prompts import picture
from aircache_sglang.testing.server import png_data_url
from tests.support.families import Family, Sound, Video

QUESTION = "what is above the small white house?"
# A request that is never answered must fail the test, not the run.
SECONDS = 120.0


def one_bit_png(side: int) -> str:
    """A black picture of side x side pixels in a few hundred KiB of base64, as a `data:` URL."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side // 8 + 2) * side))
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b""))
    encoded = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()
    return f"data:image/png;base64,{encoded}"


def body(family: Family, *turns: Any, images: list[Any], **fields: Any) -> dict[str, Any]:
    """Of /generate: turns as `Family.prompt` takes them, but the pictures apart."""
    system = fields.pop("system", None)
    prompt = family.prompt(*turns, system=system)
    sampling = {"max_new_tokens": 4, "temperature": 0.0, "ignore_eos": True}
    data = {"text": prompt.text, "image_data": images, "sampling_params": sampling}
    if prompt.videos:
        data["video_data"] = list(prompt.videos)
    return {**data, **fields}


def refused(family: Family) -> dict[str, dict[str, Any]]:
    """Requests of /generate that must end in HTTP 400, with what their sentence says."""
    image, words = family.image, family.words
    token = words.token
    one, two = png_data_url(picture(1, 10, 10)), png_data_url(picture(2, 9, 11))
    good = [image, QUESTION]
    cases = {
        "the text says the token": body(family, [image, f"what is {token}?"], images=[one]),
        "the text says the mark": body(family, [image, f"what is {image}?"], images=[one]),
        "an earlier turn says it": body(
            family, good, [f"that is {token}"], ["and more?"], images=[one]
        ),
        "the system prompt says it": body(family, good, images=[one], system=f"see {token}"),
        "three marks, two pictures": body(
            family, [image, image, image, QUESTION], images=[one, two], **family.several
        ),
        "a file that is not there": body(family, good, images=["/nowhere/at/all.png"]),
        "a URL of no file": body(family, good, images=["file:///nowhere/at/all.png"]),
        "a folder": body(family, good, images=["/usr"]),
        "no picture": body(family, good, images=[png_data_url_of(b"not a picture")]),
        "half a picture": body(family, good, images=[one[: len(one) // 2 // 4 * 4]]),
        "a decompression bomb": body(family, good, images=[one_bit_png(30_000)]),
        "an embedding in JSON": body(
            family, good, images=[{"format": "precomputed_embedding", "feature": [[0.0] * 64]}]
        ),
        "a format that nobody knows": body(
            family, good, images=[{"format": "jpeg", "feature": [[0.0] * 64]}]
        ),
        "a number": body(family, good, images=[7]),
    }
    if family.counts:
        cases["no picture at all"] = body(family, [f"what is {token}?"], images=[])
    for mark in words.encloses:
        cases[f"{mark} before a picture"] = body(family, [f"a {mark}", *good], images=[one])
    if not words.adds_marks:
        cases["two pictures, one mark"] = body(family, good, images=[one, two], **family.several)
        cases["a picture without a mark"] = body(family, [QUESTION], images=[one])
    return cases


def png_data_url_of(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def answered(family: Family) -> dict[str, dict[str, Any]]:
    """Requests of /generate that look bad, and are to be answered."""
    image, one, words = family.image, png_data_url(picture(1, 10, 10)), family.words
    cases = {}
    if not family.counts:
        cases["no picture at all"] = body(family, [f"what is {words.token}?"], images=[])
    for token in (*words.brackets, *words.encloses):
        cases[f"{token} alone"] = body(family, [image, f"what is {token} there?"], images=[one])
    return cases


def videos(family: Family, video: Video) -> dict[str, dict[str, Any]]:
    """Requests with a video that must end in HTTP 400."""
    assert family.video is not None
    one, says = png_data_url(picture(1, 10, 10)), f"what is {family.video}?"
    nowhere = ["/nowhere/at/all.mp4"]
    cases = {
        "the text says the video's mark": body(family, [video, says], images=[]),
        "a video that is not there": body(
            family, [family.video, QUESTION], images=[], video_data=nowhere
        ),
    }
    if not family.words.adds_marks:
        cases["a video without a mark"] = body(
            family, [family.image, QUESTION], images=[one], video_data=[video.path]
        )
    return cases


def sounds(family: Family, sound: Sound) -> dict[str, dict[str, Any]]:
    """Requests with a sound that must end in HTTP 400."""
    assert family.sound is not None
    one, text = png_data_url(picture(1, 10, 10)), [family.image, QUESTION]
    heard = [family.image, family.sound, QUESTION]
    return {
        "two sounds, one mark": body(family, heard, images=[one], audio_data=[sound.path] * 2),
        "a sound without a mark": body(family, text, images=[one], audio_data=[sound.path]),
        "a mark without a sound": body(family, heard, images=[one]),
        "a sound that is not there": body(
            family, heard, images=[one], audio_data=["/nowhere/at/all.wav"]
        ),
        "no sound": body(family, heard, images=[one], audio_data=[one]),
    }


def post(server: Server, data: dict[str, Any], path: str = "/generate") -> tuple[int, Any]:
    """Status and decoded answer; TimeoutError of requests for a request that hangs."""
    server.timeout = SECONDS
    response = server.request("POST", path, data)
    is_json = response.headers.get("content-type", "").startswith("application/json")
    return response.status_code, response.json() if is_json else response.text


def sentence_of(answer: Any) -> str:
    """What an error says, in the forms of SGLang's endpoints."""
    said = answer.get("error", answer)
    return str(said if isinstance(said, str) else said["message"])


def assert_all_end_well(
    server: Server, family: Family, video: Video | None = None, sound: Sound | None = None
) -> None:
    """Each ends in HTTP 400 and one sentence, or is answered; a good request is, after each."""
    one = png_data_url(picture(1, 10, 10))
    good = body(family, [family.image, QUESTION], images=[one])
    status, expected = post(server, good)
    assert status == 200, expected
    bad = refused(family) | ({} if video is None else videos(family, video))
    bad |= {} if sound is None else sounds(family, sound)
    for name, data in (bad | answered(family)).items():
        status, answer = post(server, data)
        if name in bad:
            assert status == 400, f"{name}: HTTP {status}, {answer}"
            said = sentence_of(answer)
            assert said and "\n" not in said and len(said) < 500, f"{name}: {said}"
        else:
            assert status == 200, f"{name}: HTTP {status}, {answer}"
        status, answer = post(server, good)
        assert status == 200, f"after {name}: {answer}"
        assert answer["output_ids"] == expected["output_ids"], f"after {name}"
