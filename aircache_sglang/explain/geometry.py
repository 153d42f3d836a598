# SPDX-License-Identifier: Apache-2.0
"""Where each visual token lies on its picture, for every family that is served.

Each family's own: native grids of merged patches, tiles and thumbnails, AnyRes with separators,
centre crops. Sizes come from the checkpoint's image processor and configuration. A layout that does
not give the number of tokens that the server counted is no layout: `check_count` raises then.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

# (left, top, right, bottom) as shares of the picture's width and height, within [0, 1].
Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


class Unplaced(ValueError):
    """Why tokens cannot be placed on the picture, in one sentence."""


# Whose processor turns pictures by their EXIF data.
GLM = (
    "Glm4vForConditionalGeneration",
    "Glm4vMoeForConditionalGeneration",
    "GlmOcrForConditionalGeneration",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Panel:
    """Visual tokens that follow one another and cover one view of one picture.

    picture: index among the request's pictures, or of a video's frames behind them.
    view: what the panel shows of it, as `overview`; empty where there is one view alone.
    boxes: of each token, ascending ordinals; None is a separator, which has no place.
    """

    picture: int
    view: str
    boxes: tuple[Box | None, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """What a checkpoint says of its pictures.

    config: its config.json.
    folder: where the image processor is read from.
    """

    config: dict[str, Any]
    folder: str

    @classmethod
    def read(cls, folder: str) -> Model:
        """Raises Unplaced where the checkpoint is not on this machine."""
        from transformers.utils import cached_file

        try:
            path = cached_file(folder, "config.json")
            return cls(json.loads(Path(str(path)).read_text()), folder)
        except (OSError, ValueError) as error:
            raise Unplaced(
                f"the tokens cannot be placed on the picture, since {folder} cannot be read here; "
                "--model-path names a copy of the checkpoint"
            ) from error

    @property
    def architecture(self) -> str:
        return str((self.config.get("architectures") or ["unknown"])[0])

    def image_processor(self) -> Any:
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(self.folder)

    def processor(self) -> Any:
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(self.folder)


def place_pictures(model: Model, pictures: Sequence[Image.Image]) -> list[Panel]:
    """Panels of the pictures' visual tokens, in the order of the prompt. Raises Unplaced."""
    layout = _LAYOUTS.get(model.architecture)
    if layout is None:
        raise Unplaced(
            f"the tokens of {model.architecture} cannot be placed on the picture, "
            "since its layout is not known"
        )
    return list(layout(model, pictures))


def check_count(panels: Sequence[Panel], n_visual: int) -> None:
    """Raises Unplaced unless the panels hold as many tokens as the server counted."""
    count = sum(len(panel.boxes) for panel in panels)
    if count != n_visual:
        raise Unplaced(
            "the tokens cannot be placed on the picture, since the checkpoint's processor gives "
            f"{count} and the server counted {n_visual}"
        )


def grid(rows: int, columns: int, area: Box = WHOLE) -> Iterator[Box]:
    """Equal boxes of an area, row after row; what lies outside of the picture is cut off."""
    left, top, right, bottom = area
    width, height = (right - left) / columns, (bottom - top) / rows

    def cut(value: float) -> float:
        return min(max(value, 0.0), 1.0)

    for row in range(rows):
        for column in range(columns):
            x, y = left + column * width, top + row * height
            yield cut(x), cut(y), cut(x + width), cut(y + height)


def _native(model: Model, pictures: Sequence[Image.Image]) -> Iterator[Panel]:
    """One grid of merged patches; the resized picture is the whole picture, not cut, not padded."""
    processor = model.image_processor()
    merge = int(processor.merge_size)
    for index, picture in enumerate(pictures):
        sizes = processor(images=[picture], return_tensors="pt")["image_grid_thw"]
        _, height, width = sizes[0].tolist()
        yield Panel(index, "", tuple(grid(height // merge, width // merge)))


def _pixtral(model: Model, pictures: Sequence[Image.Image]) -> Iterator[Panel]:
    """One grid; the ends of rows are text, and have no ordinal."""
    processor = model.processor()
    side = int(processor.patch_size) * int(getattr(processor, "spatial_merge_size", 1))
    for index, picture in enumerate(pictures):
        found = processor.image_processor(
            images=[picture], patch_size={"height": side, "width": side}, return_tensors="pt"
        )
        height, width = (int(size) for size in found["image_sizes"][0])
        yield Panel(index, "", tuple(grid(height // side, width // side)))


def _internvl_chat(model: Model, pictures: Sequence[Image.Image]) -> Iterator[Panel]:
    """SGLang's tiles of 448 pixels (multimodal/processors/internvl.py, dynamic_preprocess)."""
    config = model.config
    patches = int(config["force_image_size"]) // int(config["vision_config"]["patch_size"])
    side = int(patches * float(config["downsample_ratio"]))
    for index, picture in enumerate(pictures):
        yield from _tiles(index, side, internvl_tiles(picture.width, picture.height))


def internvl_tiles(width: int, height: int, most: int = 12) -> tuple[int, int]:
    """(columns, rows) of tiles whose shape is nearest to the picture's; of equals, the most."""
    shapes = [(x, y) for x in range(1, most + 1) for y in range(1, most + 1) if x * y <= most]
    shapes.sort(key=lambda shape: shape[0] * shape[1])
    ratio = width / height
    return min(shapes, key=lambda shape: (abs(ratio - shape[0] / shape[1]), -shape[0] * shape[1]))


def _internvl(model: Model, pictures: Sequence[Image.Image]) -> Iterator[Panel]:
    """Transformers' tiles."""
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    processor, config = model.image_processor(), model.config
    tile = (processor.size["height"], processor.size["width"])
    patch = config["vision_config"]["patch_size"]
    patch = patch[0] if isinstance(patch, list) else patch
    side = int(tile[0] // patch * float(config["downsample_ratio"]))
    for index, picture in enumerate(pictures):
        columns, rows = get_optimal_tiled_canvas(
            (picture.height, picture.width), tile, processor.min_patches, processor.max_patches
        )
        yield from _tiles(index, side, (columns, rows))


def _tiles(index: int, side: int, shape: tuple[int, int]) -> Iterator[Panel]:
    """Tiles of side x side tokens, row after row, then the thumbnail if they are several."""
    columns, rows = shape
    boxes = [box for area in grid(rows, columns) for box in grid(side, side, area)]
    several = columns * rows > 1
    yield Panel(index, f"{columns} x {rows} tiles" if several else "", tuple(boxes))
    if several:
        yield Panel(index, "thumbnail", tuple(grid(side, side)))


def _llava(model: Model, pictures: Sequence[Image.Image]) -> Iterator[Panel]:
    """LLaVA-1.5: the centre of the picture; Pixtral has the same architecture."""
    vision = model.config["vision_config"]
    if vision.get("model_type") == "pixtral":
        yield from _pixtral(model, pictures)
        return
    processor = model.image_processor()
    crop = int(processor.crop_size["height"])
    shortest, side = int(processor.size["shortest_edge"]), crop // int(vision["patch_size"])
    for index, picture in enumerate(pictures):
        short, long = sorted(picture.size)
        stretched = (shortest, int(shortest * long / short))
        width, height = stretched if picture.width <= picture.height else stretched[::-1]
        left, top = (width - crop) // 2, (height - crop) // 2
        area = (left / width, top / height, (left + crop) / width, (top + crop) / height)
        yield Panel(index, "", tuple(grid(side, side, area)))


def _anyres(model: Model, pictures: Sequence[Image.Image]) -> Iterator[Panel]:
    """An overview, then tiles of a padded picture, its padding dropped, a separator a row."""
    config, vision = model.config, model.config["vision_config"]
    known = config.get("vision_aspect_ratio", config.get("image_aspect_ratio"))
    if known is None and model.architecture == "LlavaOnevisionForConditionalGeneration":
        known = "anyres_max_9"
    if len(pictures) > 1 and known is not None:
        raise Unplaced("several pictures of this family cannot be placed, one alone can")
    limit = re.fullmatch(r"anyres_max_(\d+)", known or "")
    tile = int(vision["image_size"])
    side = tile // int(vision["patch_size"])
    for index, picture in enumerate(pictures):
        yield Panel(index, "overview", tuple(grid(side, side)))
        canvas = best_canvas(picture.size, config["image_grid_pinpoints"])
        most = int(limit[1]) if limit else None
        boxes = list(unpadded(picture.size, canvas, tile, side, most))
        yield Panel(index, "tiles", tuple(boxes))


def best_canvas(size: tuple[int, int], pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """(width, height) of Transformers' choice among (height, width) pinpoints."""
    from transformers.image_processing_utils import select_best_resolution

    height, width = select_best_resolution((size[1], size[0]), [tuple(p) for p in pinpoints])
    return int(width), int(height)


def unpadded(
    size: tuple[int, int], canvas: tuple[int, int], tile: int, side: int, most: int | None
) -> Iterator[Box | None]:
    """Tokens of a picture in the middle of a canvas, without rows and columns of padding.

    size, canvas: (width, height) in pixels. tile: pixels of a tile, which is side x side tokens.
    most: tiles' worth of tokens above which the grid is scaled down; None for no bound.
    """
    (width, height), (across, down) = size, canvas
    scale = min(across / width, down / height)
    if across / width < down / height:
        shown = across, min(math.ceil(height * scale), down)
    else:
        shown = min(math.ceil(width * scale), across), down
    columns, rows = across // tile * side, down // tile * side
    skipped_columns = skipped_rows = 0
    if width / height > columns / rows:
        skipped_rows = (rows - int(round(height * (columns / width), 7))) // 2
    else:
        skipped_columns = (columns - int(round(width * (rows / height), 7))) // 2
    # Pixels of the canvas that the tokens cover, then of the picture that lies in its middle.
    token = tile / side
    left, top = skipped_columns * token, skipped_rows * token
    x, y = (across - shown[0]) // 2, (down - shown[1]) // 2
    area = (
        *((left - x) / shown[0], (top - y) / shown[1]),
        *((across - left - x) / shown[0], (down - top - y) / shown[1]),
    )
    columns, rows = columns - 2 * skipped_columns, rows - 2 * skipped_rows
    if most is not None:
        ratio = math.sqrt(columns * rows / (most * side**2))
        if ratio > 1.1:
            columns, rows = int(columns // ratio), int(rows // ratio)
    for ordinal, box in enumerate(grid(rows, columns, area), 1):
        yield box
        if ordinal % columns == 0:
            yield None


def _step(model: Model, pictures: Sequence[Image.Image]) -> Iterator[Panel]:
    """SGLang's windows of 9 x 9 tokens, then 13 x 13 of the whole (processors/step3_vl.py)."""
    for index, picture in enumerate(pictures):
        if min(picture.size) < 32 and max(picture.size) > 4 * min(picture.size):
            raise Unplaced("a picture this thin cannot be placed, since Step3-VL pads it")
        windows = list(step_windows(picture.width, picture.height))
        if windows:
            boxes = [box for area in windows for box in grid(9, 9, area)]
            yield Panel(index, "patches", tuple(boxes))
        yield Panel(index, "overview" if windows else "", tuple(grid(13, 13)))


def step_windows(width: int, height: int) -> Iterator[Box]:
    """Areas that become patches, row after row, as shares of the picture; some reach over it."""
    longest = max(width, height)
    if longest > 3024:
        width, height = int(width * 3024 / longest), int(height * 3024 / longest)
    long, short = max(width, height), min(width, height)
    if long <= 728:
        window = short if long / short > 1.5 else 0
    else:
        window = min(short, 504) if long / short > 4 else 504
    if window == 0:
        return

    def stretched(size: int) -> int:
        """The nearest multiple of the window, up from a fifth of it."""
        if size < window:
            return size
        return window * (size // window + (size / window - size // window > 0.2))

    across, down = stretched(width), stretched(height)
    for top in range(0, max(down, 1), window):
        for left in range(0, max(across, 1), window):
            yield left / across, top / down, (left + window) / across, (top + window) / down


def _minicpm(model: Model, pictures: Sequence[Image.Image]) -> Iterator[Panel]:
    raise Unplaced(
        "this family's tokens cannot be placed on the picture, "
        "since each is a learned query that reads a whole slice"
    )


Layout = Callable[[Model, Sequence[Image.Image]], Iterator[Panel]]
_LAYOUTS: dict[str, Layout] = {
    "Qwen2VLForConditionalGeneration": _native,
    "Qwen2_5_VLForConditionalGeneration": _native,
    "Qwen3VLForConditionalGeneration": _native,
    "Qwen3VLMoeForConditionalGeneration": _native,
    "Qwen3_5ForConditionalGeneration": _native,
    "Qwen3_5MoeForConditionalGeneration": _native,
    "InternS2PreviewForConditionalGeneration": _native,
    "Qwen3OmniMoeForConditionalGeneration": _native,
    "Glm4vForConditionalGeneration": _native,
    "Glm4vMoeForConditionalGeneration": _native,
    "GlmOcrForConditionalGeneration": _native,
    "PaddleOCRVLForConditionalGeneration": _native,
    "DotsOCRForCausalLM": _native,
    "InternVLChatModel": _internvl_chat,
    "InternVLForConditionalGeneration": _internvl,
    "Mistral3ForConditionalGeneration": _pixtral,
    "LightOnOCRForConditionalGeneration": _pixtral,
    "LlavaForConditionalGeneration": _llava,
    "LlavaNextForConditionalGeneration": _anyres,
    "LlavaNextVideoForConditionalGeneration": _anyres,
    "LlavaOnevisionForConditionalGeneration": _anyres,
    "LlavaQwenForCausalLM": _anyres,
    "StepVLForConditionalGeneration": _step,
    "MiniCPMV": _minicpm,
}
