# SPDX-License-Identifier: Apache-2.0
"""What differs between model families: placeholders, and how Transformers reads a prompt."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.vision_utils import get_vision_cu_seqlens

from aircache_sglang.testing.checkpoints import (
    make_internvl_chat,
    make_internvl_hf,
    make_llava_next_video,
    make_llava_onevision,
    make_llava_qwen,
    make_qwen2_5_vl,
    make_qwen3_vl,
    make_qwen3_vl_moe,
)
from aircache_sglang.testing.checkpoints.internvl_chat import PATCH, TILE
from aircache_sglang.testing.oracle import Oracle
from aircache_sglang.testing.prompts import Prompt

FRAMES_PER_SECOND = 2


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


Part = str | Image.Image | Video


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models.

    make: writes its tiny checkpoint.
    image, video: what stands for a picture or video in a prompt; no video where SGLang has none.
    reader: builds Transformers' side from the checkpoint; None where Transformers has no class.
    dtype: what SGLang serves it in.
    several: fields that a request with several pictures needs.
    """

    make: Callable[[Path], Path]
    image: str
    video: str | None
    reader: Callable[[Path], Reader] | None
    dtype: str = "float32"
    several: dict[str, Any] = dataclasses.field(default_factory=dict)

    def prompt(self, *turns: Sequence[Part], system: str | None = None) -> Prompt:
        """A conversation of user and assistant turns, a user's last, as ChatML."""
        text = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
        images: list[Image.Image] = []
        videos: list[str] = []
        for index, parts in enumerate(turns):
            text += f"<|im_start|>{'assistant' if index % 2 else 'user'}\n"
            for part in parts:
                if isinstance(part, str):
                    text += part
                elif isinstance(part, Video):
                    assert self.video is not None
                    text += self.video
                    videos.append(part.path)
                else:
                    text += self.image
                    images.append(part)
            text += "<|im_end|>\n"
        return Prompt(text + "<|im_start|>assistant\n", tuple(images), tuple(videos))


class Reader(Oracle):
    """Any image-text-to-text model of Transformers, its own processor included."""

    model: Any

    def _load(self, attention: str | dict[str, str]) -> Any:
        return AutoModelForImageTextToText.from_pretrained(
            self.checkpoint, dtype=torch.float32, attn_implementation=attention
        ).eval()

    def inputs(self, prompt: Prompt) -> Any:
        inputs = self.read(prompt.text, list(prompt.images), [frames_of(v) for v in prompt.videos])
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


def frames_of(path: str) -> np.ndarray:
    """uint8 [T, H, W, 3] of a file that `make_video` wrote."""
    with Image.open(path) as file:
        frames = []
        for index in range(file.n_frames):
            file.seek(index)
            frames.append(np.array(file.convert("RGB")))
    return np.stack(frames)


class QwenReader(Reader):
    """Qwen*-VL: SGLang samples and resizes the frames itself, before Transformers' processor."""

    def read(self, text: str, images: list[Image.Image], videos: list[np.ndarray]) -> Any:
        from sglang.srt.multimodal.processors.qwen_vl import preprocess_video
        from sglang.srt.utils.video_decoder import VideoDecoderWrapper

        class Decoded(VideoDecoderWrapper):
            def __init__(self, frames: np.ndarray) -> None:
                self._frames = torch.from_numpy(frames)

            def __len__(self) -> int:
                return len(self._frames)

            avg_fps = FRAMES_PER_SECOND

            def get_frames_as_tensor(self, indices: list[int]) -> torch.Tensor:
                return self._frames[indices]

            def close(self) -> None:
                pass

        sampled = [asyncio.run(preprocess_video(Decoded(video))) for video in videos]
        fields: dict[str, Any] = {}
        if sampled and "Qwen3" in type(self.processor).__name__:
            fields = {"video_metadata": [data for _, data in sampled], "do_sample_frames": False}
        return self.processor(
            text=[text],
            images=images or None,
            videos=[video for video, _ in sampled] or None,
            return_tensors="pt",
            **fields,
        )


class Qwen2_5Reader(QwenReader):
    """SGLang's full vision attention sees a whole video (models/qwen2_5_vl.py:549), not a frame."""

    def _load(self, attention: str | dict[str, str]) -> Any:
        def whole_videos(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            limits = get_vision_cu_seqlens(kwargs["grid_thw"], merge_temporal=True)
            return args, kwargs | {"cu_seqlens": limits}

        model = super()._load(attention)
        model.model.visual.register_forward_pre_hook(whole_videos, with_kwargs=True)
        return model


class InternVLChatReader(Reader):
    """The authors' InternVL as SGLang reads it: tiles in bfloat16, a line of text a frame."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(make_internvl_hf(checkpoint.with_name("twin"), tile=TILE, patch=PATCH))

    def read(self, text: str, images: list[Image.Image], videos: list[np.ndarray]) -> Any:
        from sglang.srt.multimodal.processors.internvl import InternVLProcessor as Theirs

        mean, std = Theirs._get_normalize_tensors(device="cpu")

        def tiles(picture: np.ndarray, most: int, thumbnail: bool) -> torch.Tensor:
            pixels = torch.from_numpy(picture).permute(2, 0, 1).float() / 255.0
            cut = Theirs.dynamic_preprocess((pixels - mean) / std, TILE, most, thumbnail)
            return cut.float()

        def placeholders(count: int) -> str:
            return "<img>" + "<IMG_CONTEXT>" * (16 * count) + "</img>"

        parts: dict[str, list[torch.Tensor]] = {"<image>": [], "<video>": []}
        texts: dict[str, list[str]] = {"<image>": [], "<video>": []}
        for image in images:
            parts["<image>"].append(tiles(np.array(image), Theirs.IMAGE_MAX_NUM, True))
            texts["<image>"].append(placeholders(len(parts["<image>"][-1])))
        for video in videos:
            chosen = np.linspace(0, len(video) - 1, Theirs.DEFAULT_VIDEO_NUM_FRAMES, dtype=int)
            frames = [tiles(video[i], Theirs.VIDEO_MAX_NUM, False) for i in chosen]
            parts["<video>"].append(torch.cat(frames))
            lines = [f"Frame {i + 1}: {placeholders(len(f))}" for i, f in enumerate(frames)]
            texts["<video>"].append("\n".join(lines) + "\n")
        pixels: list[torch.Tensor] = []
        pieces: list[str] = []
        while text:
            found = {text.find(kind): kind for kind in parts if kind in text}
            if not found:
                break
            place = min(found)
            kind = found[place]
            pieces += [text[:place], texts[kind].pop(0)]
            pixels.append(parts[kind].pop(0))
            text = text[place + len(kind) :]
        ids = self.processor.tokenizer("".join(pieces) + text, return_tensors="pt")["input_ids"]
        return {"input_ids": ids, "pixel_values": torch.cat(pixels)}


QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"

FAMILIES = {
    "qwen2.5-vl": Family(make_qwen2_5_vl, QWEN_IMAGE, QWEN_VIDEO, Qwen2_5Reader),
    "qwen3-vl": Family(make_qwen3_vl, QWEN_IMAGE, QWEN_VIDEO, QwenReader),
    "qwen3-vl-moe": Family(make_qwen3_vl_moe, QWEN_IMAGE, QWEN_VIDEO, QwenReader),
    "internvl-chat": Family(make_internvl_chat, "<image>", "<video>", InternVLChatReader),
    "llava-onevision": Family(make_llava_onevision, "<image>", "<video>", Reader),
    "llava-qwen": Family(
        make_llava_qwen, "<image>", None, None, "float16", {"modalities": ["multi-images"]}
    ),
    "internvl-hf": Family(make_internvl_hf, "<IMG_CONTEXT>", "<video>", Reader),
    "llava-next-video": Family(make_llava_next_video, "<image>", "<video>", Reader),
}
