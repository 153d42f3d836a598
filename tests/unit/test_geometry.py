# SPDX-License-Identifier: Apache-2.0
"""Tokens on the picture: one bright patch changes the token whose box holds it, in every family.

Where Transformers has the family, the change is that of the embeddings its vision tower hands to
the decoder; else that of the pixels that SGLang's own processor cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from aircache_sglang.explain.geometry import (
    Model,
    Panel,
    Unplaced,
    check_count,
    place_pictures,
    step_windows,
)
from aircache_sglang.testing.checkpoints import make_qwen2_vl
from tests.support.families import FAMILIES
from tests.support.families.qwen import QWEN_IMAGE, QwenReader

READ = {name: family for name, family in FAMILIES.items() if family.reader is not None}
# Wide, tall, and a shape that leaves padding and odd rows of tiles.
SIZES = ((336, 168), (168, 308), (300, 220))
SPOTS = ((0.13, 0.2), (0.62, 0.37), (0.41, 0.83), (0.9, 0.9))


def place(model: Model, pictures: Sequence[Image.Image], n_visual: int) -> list[Panel]:
    """As the command does it (explain/command.py); n_visual: what the server counted."""
    panels = place_pictures(model, pictures)
    check_count(panels, n_visual)
    return panels


def blank(size: tuple[int, int]) -> Image.Image:
    """A grey picture with a little noise."""
    noise = np.random.default_rng(0).integers(118, 138, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def spotted(size: tuple[int, int], spot: tuple[float, float], reach: float = 5) -> Image.Image:
    """The same with a white square around a place, given in shares of width and height."""
    picture = blank(size)
    x, y = spot[0] * size[0], spot[1] * size[1]
    ImageDraw.Draw(picture).rectangle((x - reach, y - reach, x + reach, y + reach), fill="white")
    return picture


def assert_spot_is_found(
    panels: list[Panel], size: tuple[int, int], spot: tuple[float, float], change: torch.Tensor
) -> None:
    """change: float32 [n_visual]; in each panel the most changed token is one at the spot."""
    first = 0
    for panel in panels:
        part = change[first : first + len(panel.boxes)]
        first += len(panel.boxes)
        margin = [6 / side for side in size]
        touched = [
            ordinal
            for ordinal, box in enumerate(panel.boxes)
            if box is not None
            and all(
                box[axis] - margin[axis] < spot[axis] < box[axis + 2] + margin[axis]
                for axis in range(2)
            )
        ]
        if not touched:  # the crop of LLaVA-1.5 leaves the ends out
            assert part.max() < 1e-4
            continue
        found = int(part.argmax())
        assert found in touched, f"{panel.view}: {found} changed most, {touched} lie at {spot}"
        assert len(touched) <= max(4, len(panel.boxes) // 12)


def embeddings(reader: Any, prompt: Any) -> torch.Tensor:
    """float32 [n_visual, hidden]: what the decoder is given at the visual positions."""
    seen: list[torch.Tensor] = []
    inputs = reader.inputs(prompt)
    decoder = next(
        module
        for name, module in reader.model.named_modules()
        if name.endswith(("language_model", "thinker.model"))
    )

    def keep(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["inputs_embeds"][0].detach())

    handle = decoder.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        reader.run(inputs, [0])
    finally:
        handle.remove()
    return seen[0][inputs["mm_token_type_ids"][0] != 0]


def check(
    make: Callable[[Path], Path], reader_of: Any, prompt: Callable[[Image.Image], Any], path: Path
) -> None:
    checkpoint = make(path)
    reader, model = reader_of(checkpoint), Model.read(str(checkpoint))
    for size in SIZES:
        base = embeddings(reader, prompt(blank(size)))
        panels = place(model, [blank(size)], len(base))
        for spot in SPOTS:
            changed = embeddings(reader, prompt(spotted(size, spot)))
            assert_spot_is_found(panels, size, spot, (changed - base).norm(dim=-1))


@pytest.mark.parametrize("name", READ)
def test_the_bright_patch_is_found(name: str, tmp_path: Path) -> None:
    family = READ[name]
    check(
        family.make,
        family.reader,
        lambda image: family.prompt([image, "what is it?"]),
        tmp_path / "model",
    )


def test_the_bright_patch_is_found_by_qwen2_vl(tmp_path: Path) -> None:
    family = FAMILIES["qwen2.5-vl"]
    assert family.image == QWEN_IMAGE
    check(
        make_qwen2_vl,
        QwenReader,
        lambda image: family.prompt([image, "what is it?"]),
        tmp_path / "model",
    )


def test_several_pictures_follow_one_another(tmp_path: Path) -> None:
    checkpoint = FAMILIES["qwen3-vl"].make(tmp_path / "model")
    pictures = [blank((320, 320)), blank((320, 640))]
    model = Model.read(str(checkpoint))
    panels = place(model, pictures, 300)
    assert [(panel.picture, len(panel.boxes)) for panel in panels] == [(0, 100), (1, 200)]
    with pytest.raises(Unplaced, match=r"processor gives 300 and the server counted 299$"):
        place(model, pictures, 299)


def test_llava_of_its_authors(tmp_path: Path) -> None:
    """SGLang's tiles and its `unpad_image`, on the brightness of each token's pixels."""
    from sglang.srt.multimodal.mm_utils import (
        get_anyres_image_grid_shape,
        process_anyres_image,
        unpad_image,
    )

    model = Model.read(str(FAMILIES["llava-qwen"].make(tmp_path / "model")))
    processor, pinpoints = model.image_processor(), model.config["image_grid_pinpoints"]
    side = 8

    def tokens(picture: Image.Image) -> torch.Tensor:
        tiles = torch.from_numpy(process_anyres_image(picture, processor, pinpoints)).float()
        tiles = torch.nn.functional.avg_pool2d(tiles.mean(1, keepdim=True), 14)  # [n, 1, 8, 8]
        columns, rows = get_anyres_image_grid_shape(picture.size, pinpoints, 112)
        whole = tiles[1:, 0].view(rows, columns, side, side).permute(0, 2, 1, 3)
        whole = unpad_image(whole.reshape(1, rows * side, columns * side), picture.size)[0]
        ends = torch.zeros(len(whole), 1)
        return torch.cat([tiles[0].flatten(), torch.cat([whole, ends], dim=1).flatten()])

    for size in SIZES:
        base = tokens(blank(size))
        panels = place(model, [blank(size)], len(base))
        for spot in SPOTS:
            assert_spot_is_found(panels, size, spot, (tokens(spotted(size, spot)) - base).abs())
    with pytest.raises(Unplaced, match="several pictures"):
        place(model, [blank(SIZES[0])] * 2, 128)


def test_dots_ocr(tmp_path: Path) -> None:
    """Four patches of 14 x 14 pixels that follow one another are a token."""
    model = Model.read(str(FAMILIES["dots-ocr"].make(tmp_path / "model")))
    processor = model.image_processor()

    def tokens(picture: Image.Image) -> torch.Tensor:
        patches = processor(images=[picture], return_tensors="pt")["pixel_values"]
        return patches.reshape(-1, 4 * patches.shape[-1]).mean(-1)

    for size in SIZES:
        base = tokens(blank(size))
        panels = place(model, [blank(size)], len(base))
        for spot in SPOTS:
            assert_spot_is_found(panels, size, spot, (tokens(spotted(size, spot)) - base).abs())


@pytest.mark.parametrize(
    "size", [(600, 600), (700, 300), (300, 700), (1500, 1100), (800, 1200), (3200, 700), (740, 480)]
)
def test_step_vl(size: tuple[int, int], tmp_path: Path) -> None:
    """SGLang's own patcher cuts the pictures."""
    from sglang.srt.multimodal.processors.step3_vl import ImagePatcher

    model = Model.read(str(FAMILIES["step-vl"].make(tmp_path / "model")))

    def tokens(picture: Image.Image) -> torch.Tensor:
        whole, patches, _ = ImagePatcher()(picture)
        cut = [patch.resize((9 * 8, 9 * 8)) for patch in patches] + [whole.resize((13 * 8, 13 * 8))]
        bright = [torch.from_numpy(np.array(part)).float().mean(-1)[None, None] for part in cut]
        return torch.cat([torch.nn.functional.avg_pool2d(b, 8).flatten() for b in bright])

    base = tokens(blank(size))
    assert len(list(step_windows(*size))) * 81 + 169 == len(base)
    panels = place(model, [blank(size)], len(base))
    for spot in SPOTS:
        change = (tokens(spotted(size, spot, reach=12)) - base).abs()
        assert_spot_is_found(panels, size, spot, change)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("minicpm")])
def test_what_has_no_place_says_so(name: str, tmp_path: Path) -> None:
    model = Model.read(str(FAMILIES[name].make(tmp_path / "model")))
    with pytest.raises(Unplaced, match=r"^this family's tokens cannot be placed on the picture"):
        place(model, [blank(SIZES[0])], 16)


def test_every_served_family_has_a_layout() -> None:
    from aircache_patches.support import ARCHITECTURES
    from aircache_sglang.explain.geometry import _LAYOUTS

    assert set(_LAYOUTS) == set(ARCHITECTURES)


def test_what_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(Unplaced, match="--model-path names a copy"):
        Model.read(str(tmp_path / "nowhere"))
    with pytest.raises(Unplaced, match="NewModel cannot be placed"):
        place(Model({"architectures": ["NewModel"]}, ""), [blank(SIZES[0])], 4)
