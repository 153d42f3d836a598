# SPDX-License-Identifier: Apache-2.0
"""Pictures and prompts of exactly known lengths for the tiny checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from aircache_sglang.testing.checkpoints.qwen2_vl import PIXELS_PER_TOKEN
from aircache_sglang.testing.checkpoints.vocabulary import WORDS
from aircache_sglang.testing.server import Server

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The text of a prompt, one placeholder a picture, video or sound; pictures, and files."""

    text: str
    images: tuple[Image.Image, ...] = ()
    videos: tuple[str, ...] = ()
    audios: tuple[str, ...] = ()


def picture(seed: int, rows: int = 10, columns: int = 10) -> Image.Image:
    """A picture of rows * columns visual tokens, one random colour a token."""
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    size = (columns * PIXELS_PER_TOKEN, rows * PIXELS_PER_TOKEN)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def words(count: int, seed: int = 0) -> str:
    """``count`` random words; each is one token, its leading space included."""
    return "".join(" " + word for word in np.random.default_rng(seed).choice(WORDS, count))


def user_prompt(*parts: str | Image.Image, system: str | None = None) -> Prompt:
    """One user turn of text and pictures in the order given, as the chat template writes it."""
    images = tuple(part for part in parts if not isinstance(part, str))
    content = "".join(part if isinstance(part, str) else PICTURE for part in parts)
    head = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    return Prompt(f"{head}<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n", images)


def ask(
    server: Server, prompt: Prompt, overrides: dict[str, Any] | None = None, **fields: Any
) -> Any:
    """Generate greedily with logprobs (top 5 as well); ``overrides`` are those of AirCache.

    ``fields`` as those of `Server.generate`. Never ends before ``max_new_tokens``.
    """
    sampling = {"ignore_eos": True, **fields.pop("sampling", {})}
    if overrides is not None:
        sampling["custom_params"] = {"aircache": overrides}
    fields = {"return_logprob": True, "top_logprobs_num": 5, **fields}
    if prompt.videos:
        fields["video_data"] = list(prompt.videos)
    if prompt.audios:
        fields["audio_data"] = list(prompt.audios)
    return server.generate(prompt.text, images=prompt.images, sampling=sampling, **fields)


def max_logprob_difference(expected: list[Any], answers: list[Any]) -> float:
    """Of the generated tokens of uncompressed answers, which must be the same tokens."""
    differences = []
    for one, other in zip(expected, answers, strict=True):
        assert other["meta_info"]["aircache"] is None
        assert other["output_ids"] == one["output_ids"] and other["text"] == one["text"]
        steps = (answer["meta_info"]["output_token_logprobs"] for answer in (one, other))
        differences += [abs(left[0] - right[0]) for left, right in zip(*steps, strict=True)]
    return max(differences)
