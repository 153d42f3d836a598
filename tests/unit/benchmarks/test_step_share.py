# SPDX-License-Identifier: Apache-2.0
"""Whose a sample of the scheduler is (benchmarks/step_share.py)."""

from __future__ import annotations

import pytest

from benchmarks.step_share import owner, shares

LOOP = "<module> (<string>:1);event_loop_overlap (/site/sglang/srt/managers/scheduler.py:9)"
HOOK = "forward_batch_generation (/repo/patches/aircache_patches/forward.py:40)"
STOCK = "forward_decode (/site/sglang/srt/layers/attention/torch_native_backend.py:1)"


@pytest.mark.parametrize(
    ("inner", "whose"),
    [
        ("recv_requests (/site/sglang/srt/managers/recv.py:1);wait (/lib/select.py:1)", "idle"),
        (STOCK, "stock"),
        (f"{HOOK};{STOCK}", "stock"),
        (f"{HOOK};linear (/site/torch/nn/functional.py:1)", "aircache_patches/forward.py"),
        (HOOK, "aircache_patches/forward.py"),
        (f"{HOOK};set (/repo/aircache_sglang/engine/kv_pool.py:3)", "in place"),
        (
            "attend (/repo/aircache_sglang/runtime/decode.py:3);<genexpr> (<string>:1)",
            "aircache_sglang/runtime/decode.py",
        ),
    ],
)
def test_the_innermost_frame_outside_torch_decides(inner: str, whose: str) -> None:
    assert owner(f"{LOOP};{inner}") == whose


def test_shares_leave_out_what_is_idle() -> None:
    found = shares(
        [
            f"{LOOP};recv_requests (/site/sglang/srt/managers/recv.py:1) 500",
            f"{LOOP};{STOCK} 90",
            f"{LOOP};{HOOK} 6",
            f"{LOOP};{HOOK};set (/repo/aircache_sglang/engine/kv_pool.py:3) 4",
            "run (/lib/threading.py:1) 700",
        ]
    )
    assert found == {
        "samples": 100,
        "ours": 0.06,
        "in_place": 0.04,
        "files": {"aircache_patches/forward.py": 0.06},
    }
