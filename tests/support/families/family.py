# SPDX-License-Identifier: Apache-2.0
"""A family of models in the tests: its checkpoint, its placeholders, and Transformers' reader."""

from __future__ import annotations

import dataclasses
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from aircache_sglang.testing.oracle import Oracle
from aircache_sglang.testing.prompts import Prompt

FRAMES_PER_SECOND = 2
SAMPLES_PER_SECOND = 16_000


@dataclasses.dataclass(frozen=True)
class Video:
    """A file of frames, uint8 [T, H, W, 3], at FRAMES_PER_SECOND."""

    path: str
    frames: np.ndarray


def make_video(path: Path, seed: int, *, frames: int = 6, side: int = 112) -> Video:
    """Write a lossless animated PNG of side x side pixels, random blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (frames, 4, 4, 3), dtype=np.uint8)
    pictures = [
        Image.fromarray(block).resize((side, side), Image.Resampling.NEAREST) for block in blocks
    ]
    pictures[0].save(
        path,
        format="PNG",
        save_all=True,
        append_images=pictures[1:],
        duration=1000 // FRAMES_PER_SECOND,
        default_image=False,
    )
    return Video(str(path), np.stack([np.asarray(picture) for picture in pictures]))


@dataclasses.dataclass(frozen=True)
class Sound:
    """A WAV file at SAMPLES_PER_SECOND."""

    path: str


def make_sound(path: Path, seed: int, *, seconds: float = 1.0) -> Sound:
    """Write noise of 16 bits, one channel."""
    count = round(seconds * SAMPLES_PER_SECOND)
    samples = np.random.default_rng(seed).integers(-8_000, 8_000, count, dtype=np.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLES_PER_SECOND)
        file.writeframes(samples.tobytes())
    return Sound(str(path))


Part = str | Image.Image | Video | Sound


@dataclasses.dataclass(frozen=True)
class Words:
    """What a family's prompts say besides text.

    token: what a picture of n tokens fills n times. brackets: tokens on each side of a picture.
    encloses: tokens between which SGLang looks for pictures, wherever they are said.
    adds_marks: whether SGLang's processor writes the marks that a prompt lacks.
    """

    token: str
    brackets: tuple[str, ...] = ()
    encloses: tuple[str, ...] = ()
    adds_marks: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models.

    make: writes its tiny checkpoint.
    image, video: what stands for a picture or video in a prompt; no video where SGLang has none.
    reader: builds Transformers' side from the checkpoint; None where Transformers has no class.
    words: what else its prompts say.
    dtype: what SGLang serves it in.
    several: fields that a request with several pictures needs.
    flags: what its server needs besides.
    env: variables that its server needs besides.
    has_tree: whether SGLang serves it with a radix cache.
    sound: what stands for a sound in a prompt; None where SGLang has none.
    expansion: what SGLang's processor writes for the i-th picture; for families without a reader.
    is_mended: whether stock SGLang does not start it, and is compared with one that does.
    counts: whether a text without a picture must not say the token of pictures.
    adjacent: whether SGLang tells pictures apart that have no text between them.
    """

    make: Callable[[Path], Path]
    image: str
    video: str | None
    reader: Callable[[Path], Reader] | None
    words: Words
    dtype: str = "float32"
    several: dict[str, Any] = dataclasses.field(default_factory=dict)
    flags: tuple[str, ...] = ()
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    has_tree: bool = True
    sound: str | None = None
    expansion: Callable[[int, Image.Image], str] | None = None
    is_mended: bool = False
    counts: bool = False
    adjacent: bool = True

    def prompt(self, *turns: Sequence[Part], system: str | None = None) -> Prompt:
        """A conversation of user and assistant turns, a user's last, as ChatML."""
        text = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
        images: list[Image.Image] = []
        videos: list[str] = []
        sounds: list[str] = []
        for index, parts in enumerate(turns):
            text += f"<|im_start|>{'assistant' if index % 2 else 'user'}\n"
            for part in parts:
                if isinstance(part, str):
                    text += part
                elif isinstance(part, Video):
                    assert self.video is not None
                    text += self.video
                    videos.append(part.path)
                elif isinstance(part, Sound):
                    assert self.sound is not None
                    text += self.sound
                    sounds.append(part.path)
                else:
                    text += self.image
                    images.append(part)
            text += "<|im_end|>\n"
        text += "<|im_start|>assistant\n"
        return Prompt(text, tuple(images), tuple(videos), tuple(sounds))


class Reader(Oracle):
    """Any image-text-to-text model of Transformers, its own processor included."""

    model: Any

    def _load(self, attention: str | dict[str, str]) -> Any:
        return AutoModelForImageTextToText.from_pretrained(
            self.checkpoint, dtype=torch.float32, attn_implementation=attention
        ).eval()

    def inputs(self, prompt: Prompt) -> Any:
        videos = [frames_of(video) for video in prompt.videos]
        return self.typed(self.read(prompt.text, list(prompt.images), videos))

    def typed(self, inputs: Any) -> Any:
        """The processor's output with `mm_token_type_ids`, where it has none."""
        if "mm_token_type_ids" not in inputs:
            ids, config = inputs["input_ids"], self.model.config
            visual = ids == config.image_token_id
            # InternVL writes a video's tokens as those of pictures.
            if getattr(config, "video_token_id", None) is not None:
                visual |= ids == config.video_token_id
            inputs["mm_token_type_ids"] = visual.long()
        return inputs

    def read(self, text: str, images: list[Image.Image], videos: list[np.ndarray]) -> Any:
        """The processor's output for a prompt; videos are uint8 [T, H, W, 3]."""
        return self.processor(
            text=[text], images=images or None, videos=videos or None, return_tensors="pt"
        )


def decoder_of(frames: np.ndarray) -> Any:
    """A video as SGLang's processors are given it; frames are uint8 [T, H, W, 3]."""
    from sglang.srt.utils.video_decoder import VideoDecoderWrapper

    class Decoded(VideoDecoderWrapper):
        avg_fps = FRAMES_PER_SECOND

        def __init__(self) -> None:
            self._frames = torch.from_numpy(frames)

        def __len__(self) -> int:
            return len(self._frames)

        def get_frames_as_tensor(self, indices: list[int]) -> torch.Tensor:
            return self._frames[indices]

        def close(self) -> None:
            pass

    return Decoded()


def frames_of(path: str) -> np.ndarray:
    """uint8 [T, H, W, 3] of a file that `make_video` wrote."""
    with Image.open(path) as file:
        frames = []
        for index in range(file.n_frames):
            file.seek(index)
            frames.append(np.array(file.convert("RGB")))
    return np.stack(frames)


def samples_of(path: str) -> np.ndarray:
    """float64 [n] in [-1, 1) of a file that `make_sound` wrote."""
    with wave.open(path) as file:
        return np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16) / 32_768
