# SPDX-License-Identifier: Apache-2.0
"""`score` against its oracle (eqs. 4 to 8)."""

from __future__ import annotations

import pytest
import torch

from aircache_kernels import reference, score, scoring
from aircache_kernels.validation import FP8_DTYPE, HEAD_DIMS
from tests.unit.kernels.cases import ScoreCase, prefix, score_case


def run(case: ScoreCase, **options: object) -> torch.Tensor:
    return score(
        *case.inputs(),
        max_qo_len=case.max_qo_len,
        max_kv_len=case.max_kv_len,
        sm_scale=case.sm_scale,
        **options,
    )


def hold(case: ScoreCase, **options: object) -> None:
    """Error against float64 at most twice that of eager code in the inputs' type, or float32's."""
    got = run(case, **options)
    mask = reference.elite_mask_reference(*case.inputs()[:4], sm_scale=case.sm_scale, **options)
    oracle = {"sm_scale": case.sm_scale, "elite_mask": mask, **options}
    truth = reference.score_reference(*case.inputs(), **oracle)
    eager = reference.score_reference(*case.inputs(), **oracle, dtype=case.q.dtype)
    floor = 16 * torch.finfo(torch.float32).eps * truth.max()
    allowed = 2 * (eager.double() - truth).abs().max() + floor
    assert (got.double() - truth).abs().max() <= allowed
    assert got.isfinite().all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim: int, device: torch.device) -> None:
    hold(score_case([5, 17], [63, 130], head_dim=head_dim, n_layers=1, device=device))


@pytest.mark.parametrize(("n_q", "n_kv"), [(1, 1), (3, 3), (7, 1), (14, 2), (16, 1), (21, 1)])
def test_groups(n_q: int, n_kv: int, device: torch.device) -> None:
    hold(score_case([9], [33], n_q=n_q, n_kv=n_kv, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fp8", [False, True])
def test_dtypes(dtype: torch.dtype, fp8: bool, device: torch.device) -> None:
    kv_dtype = FP8_DTYPE if fp8 else None
    case = score_case([11, 20], [50, 70], dtype=dtype, kv_dtype=kv_dtype, device=device)
    hold(case)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("elite", ["per-head", "shared"])
def test_elite_window(alpha: float, elite: str, device: torch.device) -> None:
    hold(score_case([40, 3, 70], [100, 31, 1], device=device, seed=3), alpha=alpha, elite=elite)


def test_shared_window_of_a_large_group(device: torch.device) -> None:
    hold(score_case([20], [40], n_q=36, n_kv=2, device=device), elite="shared", alpha=0.4)


def test_longest_instruction(device: torch.device) -> None:
    case = score_case([512, 500], [70, 9], n_layers=1, n_q=2, n_kv=1, head_dim=16, device=device)
    hold(case, alpha=0.0)


def test_many_visual_tokens(device: torch.device) -> None:
    hold(score_case([33], [5003], n_layers=1, n_q=2, n_kv=1, head_dim=64, device=device))


def test_most_visual_tokens_reach_the_last(device: torch.device) -> None:
    case = score_case([2], [131072], n_layers=1, n_q=1, n_kv=1, head_dim=16, device=device)
    hold(case, alpha=0.0)


def test_int32_slots(device: torch.device) -> None:
    hold(score_case([12], [45], device=device, index_dtype=torch.int32))


def test_strided_queries(device: torch.device) -> None:
    """Q as a slice of a fused qkv tensor, K as a plane of [L, 2, ...]."""
    case = score_case([12, 6], [45, 20], device=device)
    case.q = torch.cat((case.q, case.q * 3), dim=2)[:, :, :4]
    case.k_all = torch.stack((case.k_all, case.k_all * 5), dim=1)[:, 0]
    assert not case.q.is_contiguous() and not case.k_all.is_contiguous()
    hold(case)


def test_a_request_without_instruction_gets_zeros(device: torch.device) -> None:
    case = score_case([4, 0, 6], [20, 30, 10], device=device)
    got = run(case)
    assert (got[:, :, 20:50] == 0).all()
    hold(case)


def test_one_elite_token_is_a_softmax_over_visual_and_itself(device: torch.device) -> None:
    """Known answer: equal keys everywhere give 1 / (N_v + N_elite) to each visual token."""
    case = score_case([5], [11], device=device)
    case.k_all = torch.ones_like(case.k_all)
    torch.testing.assert_close(run(case), torch.full_like(run(case), 1 / 16), rtol=1e-6, atol=0)


def test_a_dominant_key_is_a_sink(device: torch.device) -> None:
    case = score_case([5], [11], n_q=2, device=device)
    case.q = torch.full_like(case.q, 2.0)
    case.k_all[:, case.kv_indices[7]] = 50.0
    got = run(case)
    assert (got[:, :, 7] > 0.999).all()


def test_no_other_request_changes_a_score(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Bit for bit: how a request is cut follows from its own number of visual tokens."""
    monkeypatch.setattr(scoring, "_CHUNK", 64)
    case = score_case([20, 3], [150, 31], n_layers=1, device=device)
    together = run(case, alpha=0.1)
    assert torch.equal(together, run(case, alpha=0.1))
    text, visual = case.qo_indptr.tolist(), case.kv_indptr.tolist()
    for b in range(2):
        n_text, n_visual = text[b + 1] - text[b], visual[b + 1] - visual[b]
        alone = score(
            case.q[:, text[b] : text[b + 1]],
            prefix([n_text], device),
            case.k_all,
            case.text_indices[text[b] : text[b + 1]].clone(),
            prefix([n_visual], device),
            case.kv_indices[visual[b] : visual[b + 1]].clone(),
            max_qo_len=n_text,
            max_kv_len=n_visual,
            sm_scale=case.sm_scale,
            alpha=0.1,
        )
        assert torch.equal(alone, together[:, :, visual[b] : visual[b + 1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_qo_len": 513}, "max_qo_len must be an integer in"),
        ({"max_kv_len": 131073}, "max_kv_len must be an integer in"),
        ({"sm_scale": float("nan")}, "sm_scale must be a finite"),
        ({"alpha": 1.5}, "alpha must be a finite"),
        ({"elite": "some"}, "elite must be one of"),
    ],
)
def test_bad_options(change: dict[str, object], message: str, device: torch.device) -> None:
    case = score_case([5], [11], device=device)
    options = {"max_qo_len": 5, "max_kv_len": 11, "sm_scale": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        score(*case.inputs(), **options)


def test_bad_tensors(device: torch.device) -> None:
    case = score_case([5], [11], device=device)
    options = {"max_qo_len": 5, "max_kv_len": 11, "sm_scale": 1.0}
    q, qo, k, text, kv, slots = case.inputs()
    with pytest.raises(ValueError, match=r"q must have shape \[2, total_qo, H_q, 32\], got"):
        score(q[:1], qo, k, text, kv, slots, **options)
    with pytest.raises(ValueError, match="H_q must be a multiple"):
        score(q[:, :, :3], qo, k, text, kv, slots, **options)
    with pytest.raises(ValueError, match=r"text_indices must have shape \[5\], got \[4\]"):
        score(q, qo, k, text[:4], kv, slots, **options)
    with pytest.raises(ValueError, match="k_all must have dtype"):
        score(q.half(), qo, k, text, kv, slots, **options)
    with pytest.raises(ValueError, match="stride 1"):
        score(q, qo, k.transpose(2, 3).contiguous().transpose(2, 3), text, kv, slots, **options)
