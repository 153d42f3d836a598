# SPDX-License-Identifier: Apache-2.0
"""InternVL in the form of its authors, and in Transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from aircache_sglang.testing.checkpoints import make_internvl_chat, make_internvl_hf
from aircache_sglang.testing.checkpoints.internvl_chat import PATCH, TILE
from tests.support.families.family import Family, Reader, Words


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


FAMILIES = {
    "internvl-chat": Family(
        make_internvl_chat,
        "<image>",
        "<video>",
        InternVLChatReader,
        Words("<IMG_CONTEXT>", ("<img>", "</img>"), adds_marks=True),
    ),
    "internvl-hf": Family(
        make_internvl_hf,
        "<IMG_CONTEXT>",
        "<video>",
        Reader,
        Words("<IMG_CONTEXT>", ("<img>", "</img>")),
        has_tree=False,
        counts=True,
    ),
}
