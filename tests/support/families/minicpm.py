# SPDX-License-Identifier: Apache-2.0
"""MiniCPM-V 2.6, 4.0 and 4.5: an overview and slices, each between tags of its own."""

from __future__ import annotations

import functools

from aircache_sglang.testing.checkpoints import make_minicpm_v
from aircache_sglang.testing.checkpoints.minicpm_v_processor import MARK, TOKEN, written
from tests.support.families.family import Family, Words

FAMILIES = {
    f"minicpm-v-{version}": Family(
        *(functools.partial(make_minicpm_v, version=version), MARK, None, None),
        Words(TOKEN, encloses=("<image>", "</image>", "<slice>", "</slice>")),
        flags=("--trust-remote-code",),
        expansion=written,
        is_mended=True,
    )
    for version in ("2.6", "4.0", "4.5")
}
