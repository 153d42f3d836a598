# SPDX-License-Identifier: Apache-2.0
"""Pictures and frames of a video as the model sees them, by SGLang's own functions.

Videos: not Qwen3-Omni's, whose processor resizes frames by bounds of its own.

Imports SGLang, whose rules these are, and needs its video decoder (torchcodec and ffmpeg).
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from aircache_sglang.explain.geometry import GLM, Model, Panel, Unplaced, grid

QWEN = (
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
)


def as_glm_reads(path: Path) -> Image.Image:
    """A picture turned as its EXIF data say, its transparent parts filled
    (multimodal/processors/glm4v.py, `smart_rgb_conversion`); other families do neither."""
    from sglang.srt.utils.common import smart_to_rgb

    with Image.open(path) as picture:
        read: Any = smart_to_rgb(picture)
        return read.convert("RGB")


def place_video(
    model: Model, path: Path, first: int
) -> tuple[list[Panel], list[tuple[str, Image.Image]]]:
    """Panels of a video, and the frames that they show, each with its name.

    A step of the tower covers `temporal_patch_size` frames; the panel shows the first of them.
    first: index of the first frame among all pictures. Raises Unplaced.
    """
    if model.architecture not in QWEN + GLM:
        raise Unplaced("a video's tokens of this family cannot be placed on its frames")
    try:
        frames, sizes, merge, step = _sampled(model, path)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise Unplaced(
            f"the tokens cannot be placed on the frames, since {path} cannot be read here: {said}"
        ) from error
    count, rows, columns = int(sizes[0]), int(sizes[1]) // merge, int(sizes[2]) // merge
    panels, pictures = [], []
    for index in range(count):
        start = index * step
        panels.append(Panel(first + index, "", tuple(grid(rows, columns))))
        frame = frames[min(start, len(frames) - 1)].permute(1, 2, 0)
        last = min(start + step, len(frames))
        name = f"{path.name}, frames {start + 1} to {last}"
        pictures.append((name, Image.fromarray(frame.byte().numpy())))
    return panels, pictures


def _sampled(model: Model, path: Path) -> tuple[Any, list[int], int, int]:
    """(uint8 [T, 3, H, W], [steps, rows, columns] in patches, merge, frames a step)."""
    from sglang.srt.utils.video_decoder import VideoDecoderWrapper

    processor = model.processor().video_processor
    decoder = VideoDecoderWrapper(str(path))
    if model.architecture in QWEN:
        from sglang.srt.multimodal.processors.qwen_vl import preprocess_video

        frames, metadata = asyncio.run(preprocess_video(decoder))
    else:
        from sglang.srt.multimodal.processors.glm4v import (
            glm_processor_video_config,
            glm_sample_and_decode_sync,
        )

        rules = glm_processor_video_config(processor)
        frames, metadata = glm_sample_and_decode_sync(decoder, rules, processor)
        frames = torch.as_tensor(frames).permute(0, 3, 1, 2)  # [T, H, W, 3]
    fields: dict[str, Any] = {"do_sample_frames": False}
    if model.architecture in GLM or model.architecture.startswith("Qwen3"):
        fields["video_metadata"] = [metadata]
    found = processor(videos=[frames], return_tensors="pt", **fields)["video_grid_thw"][0]
    return frames, found.tolist(), int(processor.merge_size), int(processor.temporal_patch_size)
