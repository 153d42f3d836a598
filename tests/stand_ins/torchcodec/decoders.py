# SPDX-License-Identifier: Apache-2.0
"""`VideoDecoder` for animated PNGs."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence


@dataclasses.dataclass(frozen=True)
class Frames:
    """data: uint8 [n, H, W, 3], or [n, 3, H, W] by default."""

    data: torch.Tensor


class VideoDecoder:
    """Of torchcodec.decoders; every further option (threads, seeking) changes no frame."""

    def __init__(self, source: Any, *, dimension_order: str = "NCHW", **_: Any) -> None:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            milliseconds = float(file.info["duration"])
            frames = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(file)]
        self._frames = torch.from_numpy(np.stack(frames))
        if dimension_order == "NCHW":
            self._frames = self._frames.permute(0, 3, 1, 2)
        height, width, _ = frames[0].shape
        self.metadata = SimpleNamespace(
            average_fps=1000 / milliseconds,
            duration_seconds=len(frames) * milliseconds / 1000,
            height=height,
            num_frames=len(frames),
            width=width,
        )

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._frames[index]

    def get_frames_at(self, indices: Sequence[int]) -> Frames:
        return Frames(self._frames[list(indices)])


class AudioDecoder:
    """None: SGLang goes on with soundfile, as where torchcodec fails."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("no ffmpeg")
