# SPDX-License-Identifier: Apache-2.0
"""The processor that a tiny MiniCPM-V brings; `minicpm_v.py` copies this file into checkpoints."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

PATCH, SIDE, QUERIES, MOST = 14, 112, 16, 4
MARK, TOKEN = "(<image>./</image>)", "<unk>"


class MiniCPMVProcessor(ProcessorMixin):
    """An overview of at most SIDE**2 pixels; a larger picture is also cut into 2 to MOST slices."""

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer: Any = None, **_: Any) -> None:
        super().__init__(tokenizer)

    def __call__(self, text: Any = None, images: Any = None, **_: Any) -> BatchFeature:
        text = text[0] if isinstance(text, list) else text
        head, *tails = text.split(MARK)
        pixels, sizes = [], []
        for index, (image, tail) in enumerate(zip(images or [], tails, strict=True)):
            columns, rows = grid_of(*image.size)
            slices = [resized(image, *image.size)]
            if rows * columns > 1:
                width, height = image.size[0] // columns, image.size[1] // rows
                corners = [(c * width, r * height) for r in range(rows) for c in range(columns)]
                boxes = [(x, y, x + width, y + height) for x, y in corners]
                slices += [resized(image.crop(box), width, height) for box in boxes]
            pixels.append([patches_of(part) for part in slices])
            shapes = [[part.size[1] // PATCH, part.size[0] // PATCH] for part in slices]
            sizes.append(torch.tensor(shapes))
            head += written(index, image) + tail
        ids = self.tokenizer(head, return_tensors="pt")["input_ids"]
        return BatchFeature({"input_ids": ids, "pixel_values": pixels, "tgt_sizes": sizes})


def written(index: int, image: Image.Image) -> str:
    """What stands in a prompt for its picture of that index: a span a slice, tags between them."""
    columns, rows = grid_of(*image.size)
    tokens = TOKEN * QUERIES
    text = f"<image_id>{index}</image_id><image>{tokens}</image>"
    if rows * columns > 1:
        text += "\n".join([f"<slice>{tokens}</slice>" * columns] * rows)
    return text


def grid_of(width: int, height: int) -> tuple[int, int]:
    """Columns and rows of slices, as square as can be; (1, 1) is the overview alone."""
    count = min(math.ceil(width * height / SIDE**2), MOST)
    if count <= 1:
        return 1, 1
    grids = [
        (columns, n // columns)
        for n in range(count - 1, min(count + 1, MOST) + 1)
        for columns in range(1, n + 1)
        if n % columns == 0
    ]
    ratio = math.log(width / height)
    return min(grids, key=lambda grid: abs(ratio - math.log(grid[0] / grid[1])))


def resized(image: Image.Image, width: int, height: int) -> Image.Image:
    """At most SIDE**2 pixels, sides multiples of PATCH."""
    scale = min(1.0, SIDE / math.sqrt(width * height))
    columns, rows = (max(round(side * scale / PATCH), 1) * PATCH for side in (width, height))
    return image.convert("RGB").resize((columns, rows))


def patches_of(image: Image.Image) -> torch.Tensor:
    """float32 [3, PATCH, patches * PATCH] in [-1, 1], the authors' layout."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0
    patches = torch.nn.functional.unfold(pixels[None], PATCH, stride=PATCH)[0]
    patches = patches.reshape(3, PATCH, PATCH, -1).permute(0, 1, 3, 2)
    return patches.reshape(3, PATCH, -1)
