# SPDX-License-Identifier: Apache-2.0
"""Elite window and importance (eqs. 4 to 8) against the loop-written paper and by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aircache_sglang.policy import (
    elite_mask,
    elite_mask_batched,
    importance,
    importance_batched,
    reference_rows,
)
from tests.unit.policy import reference

# (N_t, N_v, H_kv, group, D)
SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 7, 2, 2, 3),
    (5, 1, 2, 1, 4),
    (6, 2, 1, 4, 5),
    (9, 13, 3, 1, 8),
    (11, 17, 2, 2, 7),
    (7, 31, 2, 4, 16),
]
ALPHAS = [0.0, 0.3, 0.9, 1.0]


def states(
    shape: tuple[int, int, int, int, int],
    seed: int = 0,
    layers: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q_text, k_text, k_visual, with a leading layer axis where `layers` is given."""
    n_text, n_visual, n_kv, group, dim = shape
    generator = torch.Generator().manual_seed(seed)
    lead = () if layers is None else (layers,)
    sizes = ((n_text, n_kv * group), (n_text, n_kv), (n_visual, n_kv))
    q, k, v = (
        torch.randn(*lead, *size, dim, generator=generator, dtype=torch.float64) for size in sizes
    )
    return q.to(dtype), k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("elite", ["per-head", "shared"])
def test_matches_the_paper(shape: tuple[int, int, int, int, int], alpha: float, elite: str) -> None:
    q, k, v = states(shape, seed=sum(shape))
    shared = elite == "shared"
    for scale in (None, 0.7):
        number = shape[-1] ** -0.5 if scale is None else scale
        wanted = torch.zeros(q.shape[1], k.shape[0], dtype=torch.bool)
        elites = reference.elite_tokens(q.tolist(), k.tolist(), alpha, number, shared)
        for head, tokens in enumerate(elites):
            wanted[head, tokens] = True
        mask = elite_mask(q, k, alpha=alpha, scale=scale, elite=elite)
        assert mask.dtype == torch.bool
        assert torch.equal(mask, wanted)

        scores = importance(q, k, v, alpha=alpha, scale=scale, elite=elite)
        paper = reference.importance(q.tolist(), k.tolist(), v.tolist(), alpha, number, shared)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, torch.tensor(paper), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("window", [None, 3])
def test_text_may_be_judged_too(alpha: float, window: int | None) -> None:
    """Table 6: the prompt's keys end with the instruction's own, which the rows see causally."""
    q, k_text, k_before = states((7, 31, 2, 4, 16), seed=4)
    prompt = torch.cat([k_before, k_text])
    scores = importance(q, k_text, prompt, alpha=alpha, window=window, unified=True)
    last = slice(-(window or 7), None)
    inputs = (q[last].tolist(), k_text[last].tolist(), prompt.tolist())
    paper = reference.importance(*inputs, alpha, 16**-0.5, unified=True)
    torch.testing.assert_close(scores, torch.tensor(paper), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(2))
    blocks = importance_batched(
        *(x[None] for x in (q, k_text, prompt)),
        alpha=alpha,
        window=window,
        unified=True,
        max_elements=64,
    )
    torch.testing.assert_close(blocks[0], scores)
    with pytest.raises(ValueError, match="k_visual must hold the instruction of 7 tokens too, got"):
        importance(q, k_text, prompt[:6], unified=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_widened(dtype: torch.dtype) -> None:
    q, k, v = states((11, 40, 2, 2, 16), seed=5, dtype=dtype)
    exact = importance(q.double(), k.double(), v.double(), alpha=0.3)
    torch.testing.assert_close(importance(q, k, v, alpha=0.3), exact, rtol=2e-5, atol=1e-9)


def test_elite_by_hand() -> None:
    # scale 1 and dimension 1: the reference row is 0.5, 0.46, 0.04
    q = torch.tensor([[[9.0]], [[9.0]], [[1.0]]])
    k = torch.tensor([[[math.log(0.5)]], [[math.log(0.46)]], [[math.log(0.04)]]])
    assert elite_mask(q, k, scale=1.0).tolist() == [[True, True, False]]
    assert elite_mask(q, k, scale=1.0, alpha=0.93).tolist() == [[True, False, False]]
    assert elite_mask(q, k, scale=1.0, alpha=0.09).tolist() == [[True, True, False]]
    assert elite_mask(q, k, scale=1.0, alpha=0.07).tolist() == [[True, True, True]]
    torch.testing.assert_close(
        reference_rows(q[None], k[None], scale=1.0), torch.tensor([[[0.5, 0.46, 0.04]]])
    )


def test_elite_limits_of_alpha() -> None:
    q, k, _ = states((12, 1, 2, 2, 8), seed=3)
    assert elite_mask(q, k, alpha=0.0).all()
    assert elite_mask(q, k, alpha=1.0).sum(dim=1).tolist() == [1] * 4
    # exact ties of the highest score all stay
    tied = torch.tensor([[[1.0]], [[2.0]], [[2.0]], [[0.0]]])
    assert elite_mask(torch.ones(4, 1, 1), tied, alpha=1.0).tolist() == [[False, True, True, False]]
    # a score that underflows to 0 is still kept by alpha = 0
    far = torch.tensor([[[0.0]], [[-500.0]], [[1.0]]])
    assert elite_mask(torch.ones(3, 1, 1), far, alpha=0.0).all()


def test_shared_elite_is_one_row_for_all_heads() -> None:
    # head 0 prefers token 0 (0.9, 0.1), head 1 token 1 (0.2, 0.8): the mean row is 0.55, 0.45
    k = torch.tensor([[[math.log(0.9), math.log(0.2)]], [[math.log(0.1), math.log(0.8)]]])
    q = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    assert elite_mask(q, k, scale=1.0).tolist() == [[True, False], [False, True]]
    assert elite_mask(q, k, scale=1.0, elite="shared").tolist() == [[True, False], [True, False]]
    assert elite_mask(q, k, scale=1.0, elite="shared", alpha=0.8).all()


def test_importance_by_hand() -> None:
    # one elite token of weight 5 beside visual weights 2 and 3
    k_visual = torch.tensor([[[math.log(2.0)]], [[math.log(3.0)]]])
    k_text = torch.tensor([[[math.log(0.01)]], [[math.log(5.0)]]])
    q = torch.ones(2, 1, 1)
    torch.testing.assert_close(
        importance(q, k_text, k_visual, scale=1.0), torch.tensor([[0.2, 0.3]])
    )
    # both text tokens elite, the second query is twice the first: 2, 3, 1, 5 and their squares
    q = torch.tensor([[[1.0]], [[2.0]]])
    k_text = torch.tensor([[[0.0]], [[math.log(5.0)]]])
    wanted = torch.tensor([[(2 / 11 + 4 / 39) / 2, (3 / 11 + 9 / 39) / 2]])
    torch.testing.assert_close(importance(q, k_text, k_visual, scale=1.0, alpha=0.0), wanted)


def test_elite_tokens_see_later_ones() -> None:
    # eq. 7 has no causal mask: the first elite token loses weight to the second
    k_visual, q = torch.zeros(1, 1, 1), torch.ones(2, 1, 1)
    scores = importance(q, torch.zeros(2, 1, 1), k_visual, scale=1.0)
    torch.testing.assert_close(scores, torch.tensor([[1 / 3]]))


def test_text_that_is_not_elite_does_not_matter() -> None:
    q, k, v = states((6, 9, 2, 2, 8), seed=11)
    mask = elite_mask(q, k)
    idle = ~mask.any(dim=0)
    idle[-1] = False
    assert idle.any()
    before = importance(q, k, v)
    q[idle] *= -3.0
    torch.testing.assert_close(importance(q, k, v), before)


def test_large_logits_stay_finite() -> None:
    q, k, v = states((5, 9, 2, 2, 8), seed=2, dtype=torch.float32)
    scores = importance(q * 300, k * 300, v * 300, alpha=0.0)
    assert scores.isfinite().all()
    assert (scores.sum(dim=1) <= 1 + 1e-5).all()


@pytest.mark.parametrize("elite", ["per-head", "shared"])
@pytest.mark.parametrize("max_elements", [1, 97, 700, 5000, 1 << 25])
def test_batched_equals_layer_by_layer(elite: str, max_elements: int) -> None:
    q, k, v = states((11, 37, 3, 2, 8), seed=7, layers=5)
    kept = [t.clone() for t in (q, k, v)]
    scores = importance_batched(q, k, v, alpha=0.3, elite=elite, max_elements=max_elements)
    single = [importance(q[l], k[l], v[l], alpha=0.3, elite=elite) for l in range(5)]
    torch.testing.assert_close(scores, torch.stack(single), rtol=1e-6, atol=1e-12)
    masks = [elite_mask(q[l], k[l], alpha=0.3, elite=elite) for l in range(5)]
    assert torch.equal(elite_mask_batched(q, k, alpha=0.3, elite=elite), torch.stack(masks))
    assert all(torch.equal(a, b) for a, b in zip(kept, (q, k, v), strict=True))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operator's new tensor had."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_storage(leaf) for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _storage(leaf) not in given:
                self.elements = max(self.elements, leaf.numel())
        return result


def test_memory_is_bounded() -> None:
    q, k, v = states((64, 300, 2, 4, 2), layers=3, dtype=torch.float32)
    with LargestTensor() as largest:
        importance_batched(q, k, v, max_elements=20_000)
    assert 10_000 < largest.elements <= 20_000
    # all logits at once would be 3 * 8 * 64 * 364
    with LargestTensor() as largest:
        importance_batched(q, k, v)
    assert largest.elements == 3 * 8 * 64 * 300
    # few queries: the widened keys count, and all of them at once would be 8 * 2 * 300 * 64
    q, k, v = states((1, 300, 2, 1, 64), layers=8, dtype=torch.bfloat16)
    with LargestTensor() as largest:
        importance_batched(q, k, v, max_elements=40_000)
    assert 10_000 < largest.elements <= 40_000


def test_strided_views_are_accepted() -> None:
    q, k, v = states((11, 20, 2, 2, 8), layers=4)
    packed = torch.cat([t.flatten(2) for t in (q, k)], dim=-1)
    q_view = packed[..., :32].unflatten(-1, (4, 8))
    k_view = packed[..., 32:].unflatten(-1, (2, 8))
    planes = v.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(
        importance_batched(q_view, k_view, planes), importance_batched(q, k, v)
    )


def test_window_is_the_tail_of_the_instruction() -> None:
    q, k, v = states((20, 9, 2, 2, 8), layers=2)
    wanted = importance_batched(q[:, -6:], k[:, -6:], v, alpha=0.2)
    torch.testing.assert_close(importance_batched(q, k, v, alpha=0.2, window=6), wanted)
    torch.testing.assert_close(importance(q[0], k[0], v[0], alpha=0.2, window=6), wanted[0])
    whole = importance_batched(q, k, v, alpha=0.2, window=None)
    torch.testing.assert_close(importance_batched(q, k, v, alpha=0.2, window=20), whole)
    assert not torch.allclose(whole, wanted)


def test_head_shards_equal_the_whole() -> None:
    q, k, v = states((9, 21, 4, 2, 8), layers=3)
    whole = importance_batched(q, k, v)
    parts = [
        importance_batched(q[:, :, 4 * r : 4 * r + 4], k[:, :, 2 * r : 2 * r + 2], v[:, :, s])
        for r, s in ((0, slice(0, 2)), (1, slice(2, 4)))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-6, atol=1e-12)


def test_padded_heads_and_single_tokens() -> None:
    # equal keys: every visual token gets the same share of what the elite text leaves
    q, k, v = torch.ones(1, 2, 4), torch.ones(1, 1, 4), torch.ones(3, 1, 4)
    assert elite_mask(q, k).all()
    torch.testing.assert_close(importance(q, k, v), torch.full((1, 3), 0.25))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, True, "0.9", None])
def test_bad_alpha(alpha: Any) -> None:
    q, k, v = states((2, 3, 1, 1, 4))
    with pytest.raises(ValueError, match=r"alpha must be a number in \[0, 1\], got"):
        elite_mask(q, k, alpha=alpha)
    with pytest.raises(ValueError, match="alpha must be"):
        importance(q, k, v, alpha=alpha)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan, True, "1"])
def test_bad_scale(scale: Any) -> None:
    q, k, _ = states((2, 3, 1, 1, 4))
    with pytest.raises(ValueError, match="scale must be None or a number above 0"):
        elite_mask(q, k, scale=scale)


def test_bad_shapes_and_values() -> None:
    q, k, v = states((4, 6, 2, 2, 8))
    with pytest.raises(ValueError, match=r"q_text must have shape \[N_t, H_q, D\], got \[4, 8\]"):
        elite_mask(q[:, 0], k)
    with pytest.raises(ValueError, match=r"k_text must have shape .*, got \[1, 3, 2, 8\]"):
        elite_mask(q, k[:3])
    with pytest.raises(ValueError, match=r"H_q must be a multiple of H_kv, got H_q=3, H_kv=2"):
        elite_mask(q[:, :3], k)
    with pytest.raises(ValueError, match=r"k_visual must have shape .*, got \[1, 6, 1, 8\]"):
        importance(q, k, v[:, :1])
    with pytest.raises(ValueError, match=r"k_visual must have shape .*, got \[0, 2, 8\]"):
        importance(q, k, v[:0])
    with pytest.raises(ValueError, match=r"floating-point tensor, got torch\.int64"):
        importance(q, k, v.long())
    with pytest.raises(ValueError, match=r"must be a tensor of shape .*, got list"):
        importance(q.tolist(), k, v)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k_visual must be finite"):
        importance(q, k, v.index_fill(0, torch.tensor(0), math.nan))
    with pytest.raises(ValueError, match="elite must be one of per-head, shared, got 'mean'"):
        importance(q, k, v, elite="mean")
    for window in (0, True, 2.5):
        with pytest.raises(ValueError, match="window must be an integer of at least 1"):
            importance(q, k, v, window=window)  # type: ignore[arg-type]
