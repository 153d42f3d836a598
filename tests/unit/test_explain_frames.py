# SPDX-License-Identifier: Apache-2.0
"""Tokens on the frames of a video: a bright patch in one pair of frames changes its token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aircache_sglang.explain.frames import GLM, QWEN, as_glm_reads, place_video
from aircache_sglang.explain.geometry import Model, Unplaced
from tests.support.families import FAMILIES
from tests.support.families.family import FRAMES_PER_SECOND, Video, decoder_of, frames_of
from tests.unit.test_geometry import embeddings

SIDE, FRAMES = 168, 6


def video(path: Path, spot: tuple[int, int, int] | None) -> Video:
    """Six grey frames; a white square of 12 pixels in both frames of a pair at (pair, x, y)."""
    noise = np.random.default_rng(0).integers(118, 138, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    if spot is not None:
        pair, x, y = spot
        noise[2 * pair : 2 * pair + 2, y - 6 : y + 6, x - 6 : x + 6] = 255
    first, *others = [Image.fromarray(frame) for frame in noise]
    fields: dict[str, Any] = {"save_all": True, "append_images": others, "default_image": False}
    first.save(path, format="PNG", duration=1000 // FRAMES_PER_SECOND, **fields)
    return Video(str(path), noise)


@pytest.mark.parametrize(
    "name", ["qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe", "qwen3.5", "glm-4v", "glm-4v-moe", "glm-ocr"]
)
def test_the_bright_patch_is_found_in_its_frames(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES[name]
    checkpoint = family.make(tmp_path / "model")
    assert family.reader is not None
    reader, model = family.reader(checkpoint), Model.read(str(checkpoint))
    assert model.architecture in QWEN + GLM

    def change(clip: Video) -> Any:
        return embeddings(reader, family.prompt([clip, "what is it?"]))

    still = video(tmp_path / "still.png", None)
    base = change(still)
    decoder = decoder_of(frames_of(still.path))
    with monkeypatch.context() as patch:
        patch.setattr("sglang.srt.utils.video_decoder.VideoDecoderWrapper", lambda _: decoder)
        panels, pictures = place_video(model, Path(still.path), 5)
    assert [panel.picture for panel in panels] == list(range(5, 5 + len(pictures)))
    boxes = [(index, box) for index, panel in enumerate(panels) for box in panel.boxes]
    assert len(boxes) == len(base)
    for spot in ((0, 40, 150), (1, 70, 70), (2, 120, 20)):
        found = int((change(video(tmp_path / "spot.png", spot)) - base).norm(dim=-1).argmax())
        index, box = boxes[found]
        assert box is not None
        # As many steps as pairs of frames, unless SGLang samples more frames than there are.
        assert index * FRAMES // (2 * len(panels)) == spot[0]
        x, y = (place / SIDE for place in spot[1:])
        assert box[0] - 0.04 < x < box[2] + 0.04 and box[1] - 0.04 < y < box[3] + 0.04


def test_glm_turns_pictures_and_fills_what_is_transparent(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (40, 20), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert as_glm_reads(tmp_path / "turned.jpg").size == (20, 40)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    read = as_glm_reads(tmp_path / "clear.png")
    assert read.mode == "RGB" and read.getpixel((4, 4)) == (255, 255, 255)


def test_other_families_and_unreadable_files_say_so(tmp_path: Path) -> None:
    other = Model({"architectures": ["InternVLChatModel"]}, "")
    with pytest.raises(Unplaced, match=r"^a video's tokens of this family cannot be placed"):
        place_video(other, tmp_path / "clip.mp4", 0)
    model = Model.read(str(FAMILIES["qwen3-vl"].make(tmp_path / "model")))
    with pytest.raises(Unplaced, match=r"clip\.mp4 cannot be read here"):
        place_video(model, tmp_path / "clip.mp4", 0)
