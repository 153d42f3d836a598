# SPDX-License-Identifier: Apache-2.0
"""The families of models that tests/integration/test_families.py serves, by name."""

from tests.support.families import glm, internvl, llava, pixtral, qwen
from tests.support.families.family import Family, Part, Video, make_video

__all__ = ["FAMILIES", "Family", "Part", "Video", "make_video"]

FAMILIES: dict[str, Family] = qwen.FAMILIES | internvl.FAMILIES | llava.FAMILIES
FAMILIES |= glm.FAMILIES | pixtral.FAMILIES
