# SPDX-License-Identifier: Apache-2.0
"""The families of models that tests/integration/test_families.py serves, by name."""

from tests.support.families import glm, internvl, llava, minicpm, ocr, omni, pixtral, qwen
from tests.support.families.family import Family, Part, Sound, Video, make_sound, make_video

__all__ = ["FAMILIES", "Family", "Part", "Sound", "Video", "make_sound", "make_video"]

FAMILIES: dict[str, Family] = qwen.FAMILIES | internvl.FAMILIES | llava.FAMILIES
FAMILIES |= glm.FAMILIES | pixtral.FAMILIES
FAMILIES |= ocr.FAMILIES | minicpm.FAMILIES | omni.FAMILIES
