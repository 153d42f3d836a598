# SPDX-License-Identifier: Apache-2.0
"""Models around a Pixtral tower: Mistral Small 3.1, Pixtral in Transformers' form, LightOnOCR."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from aircache_sglang.testing.checkpoints import make_lighton_ocr, make_mistral3, make_pixtral
from tests.support.families.family import Family, Reader, Words

WORDS = Words("[IMG]", ("[IMG_BREAK]", "[IMG_END]"))


class PixtralReader(Reader):
    """Its processor marks the ends of rows as visual, which to both engines are text."""

    def read(self, text: str, images: list[Image.Image], videos: list[np.ndarray]) -> Any:
        inputs = super().read(text, images, videos)
        inputs.pop("mm_token_type_ids", None)
        return inputs


FAMILIES = {
    "mistral3": Family(make_mistral3, "[IMG]", None, PixtralReader, WORDS),
    "pixtral": Family(make_pixtral, "[IMG]", None, PixtralReader, WORDS),
    "lighton-ocr": Family(make_lighton_ocr, "[IMG]", None, PixtralReader, WORDS, adjacent=False),
}
