# SPDX-License-Identifier: Apache-2.0
"""N-gram speculation on a plain CPU: in torch, what SGLang has in CUDA, Triton and AMX kernels.

Each function does what the one of SGLang does that it stands for, and takes the same arguments;
`worker` puts them in their places, in a process that verifies drafts, and in no other.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch

ALGORITHM = "NGRAM"


def worker() -> type:
    """SGLang's own NGRAMWorker (speculative/ngram_worker.py), on the functions of this file."""
    # Its import asks for sgl_kernel, which loads on no machine without CUDA or AMX.
    trees = ModuleType("sglang.kernels.ops.speculative.reconstruct_tree")
    trees.reconstruct_indices_from_tree_mask_func = describe_trees  # type: ignore[attr-defined]
    sys.modules.setdefault(trees.__name__, trees)

    from sglang.srt.mem_cache import allocation, memory_pool
    from sglang.srt.speculative import eagle_utils, spec_utils

    memory_pool.MHATokenToKVPool._init_kv_copy_and_warmup = move_in_torch
    allocation.assign_req_to_token_pool_func = write_rows
    spec_utils.fill_front_out_cache_loc_func = front_slots
    spec_utils.fill_accept_out_cache_loc_func = accepted_slots
    eagle_utils.verify_tree_greedy_func = verify_greedy
    eagle_utils.tree_speculative_sampling_target_only = verify_sampled
    eagle_utils.top_k_renorm_prob = renormed_top_k
    eagle_utils.top_p_renorm_prob = renormed_top_p

    from sglang.srt.speculative.ngram_worker import NGRAMWorker

    return NGRAMWorker


def move_in_torch(pool: Any) -> None:
    """Accepted KV is moved by `move_kv_cache_native`; else a Triton kernel is warmed up for it."""
    pool.use_native_move_kv_cache = True
    pool._kv_copy_config = None


def describe_trees(
    tree_mask: torch.Tensor,
    verified_seq_len: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """Positions and links of trees (kernels/ops/speculative/reconstruct_tree.py).

    tree_mask: bool [B * n * n], whether node i follows node j. Written: positions int64 [B * n],
    and int64 [B, n] the index of a node in the batch, its first child, and its next sibling; -1 for
    none.
    """
    n = draft_token_num
    node = torch.arange(n)
    follows = tree_mask.view(batch_size, n, n).bool() & (node < node[:, None])
    depth = follows.sum(dim=-1)
    positions.copy_((depth + verified_seq_len[:, None]).flatten())
    retrieve_index.copy_(torch.arange(batch_size * n).view(batch_size, n))
    parent = torch.where(follows, node, -1).amax(dim=-1)
    later = node[None, :] > node[:, None]
    child = (parent[:, None, :] == node[:, None]) & later
    sibling = (parent[:, None, :] == parent[:, :, None]) & later & (parent >= 0)[:, :, None]
    for links, is_linked in ((retrieve_next_token, child), (retrieve_next_sibling, sibling)):
        first = torch.where(is_linked, node, n).amin(dim=-1)
        links.copy_(torch.where(first < n, first, -1))


def verify_greedy(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
    topk: int = -1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Follow a tree as long as it says what the model says (kernels/ops/speculative/spec_tree.py).

    candidates, target_predict: integers [B, n], a node's token and the model's next one; the links
    as in `describe_trees`. Written, and returned: predicts int32 [B * n], the model's token at each
    accepted node; accept_index int32 [B, depth], those nodes, -1 behind them; accept_token_num
    int32 [B], how many of them are drafts.
    """
    index, children = retrieve_index.tolist(), retrieve_next_token.tolist()
    siblings, tokens = retrieve_next_sibling.tolist(), candidates.tolist()
    for b, said in enumerate(target_predict.tolist()):
        path, node = [], 0
        while node != -1:
            path.append(index[b][node])
            predicts[path[-1]] = said[node]
            wanted, node = said[node], children[b][node]
            while node != -1 and tokens[b][node] != wanted:
                node = siblings[b][node]
        accept(path, accept_index[b], accept_token_num[b])
    return predicts, accept_index, accept_token_num


def accept(path: list[int], accept_index: torch.Tensor, accept_token_num: torch.Tensor) -> None:
    """Note the accepted nodes of one request, the known token first."""
    accept_index[: len(path)] = torch.tensor(path, dtype=accept_index.dtype)
    accept_token_num.fill_(len(path) - 1)


def verify_sampled(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    uniform_samples: torch.Tensor,
    uniform_samples_for_final_sampling: torch.Tensor,
    target_probs: torch.Tensor,
    threshold_single: float,
    threshold_acc: float,
    **_: Any,
) -> None:
    """Follow a tree as a sampler would (kernels/jit/csrc/speculative/sampling.cuh).

    At each node its children share one coin, and what none of them takes is sampled anew. Arguments
    as in `verify_greedy`; uniform_samples: float32 [B, n], and [B] for the last token of a path;
    target_probs: float32 [B, n, vocabulary], the model's.
    """
    index, children = retrive_index.tolist(), retrive_next_token.tolist()
    siblings, tokens = retrive_next_sibling.tolist(), candidates.tolist()
    coins, last_coins = uniform_samples.tolist(), uniform_samples_for_final_sampling.tolist()
    for b in range(len(tokens)):
        path, node = [], 0
        while True:
            path.append(index[b][node])
            left, taken = target_probs[b, node].clone(), 0.0
            child = children[b][node]
            while child != -1:
                probability = float(target_probs[b, node, tokens[b][child]])
                taken += probability
                is_hit = coins[b][node] < taken / threshold_acc or probability >= threshold_single
                if probability > 0 and is_hit:
                    break
                left[tokens[b][child]] = 0.0
                child = siblings[b][child]
            if child == -1:
                break
            predicts[path[-1]] = tokens[b][child]
            node = child
        below = left.cumsum(dim=0)
        sampled = int(torch.searchsorted(below, last_coins[b] * below[-1], right=True))
        # A coin close to 1 must not find a token that cannot be.
        predicts[path[-1]] = min(sampled, int(left.nonzero()[-1])) if left.any() else sampled - 1
        accept(path, accept_index[b], accept_token_num[b])


def renormed_top_k(probs: torch.Tensor, top_ks: torch.Tensor) -> torch.Tensor:
    """The `top_ks` [n] likeliest of float32 [n, vocabulary], to a sum of 1."""
    values, order = probs.sort(dim=-1, descending=True)
    values[torch.arange(probs.shape[-1]) >= top_ks[:, None]] = 0.0
    return _renormed(values, order)


def renormed_top_p(probs: torch.Tensor, top_ps: torch.Tensor) -> torch.Tensor:
    """The likeliest of float32 [n, vocabulary] that together reach `top_ps` [n], to a sum of 1."""
    values, order = probs.sort(dim=-1, descending=True)
    values[values.cumsum(dim=-1) - values > top_ps[:, None]] = 0.0
    return _renormed(values, order)


def _renormed(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    kept = torch.zeros_like(values).scatter_(-1, order, values)
    return kept / kept.sum(dim=-1, keepdim=True)


def draft_slots(
    *,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """The slots of [start, end) of each row, int64 (kernels/ops/speculative/cache_locs.py)."""
    spans = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    return torch.cat([req_to_token[row, start:end] for row, start, end in spans]).long()


def write_rows(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int,
) -> None:
    """Deal new slots to [start, end) of each row (mem_cache/allocation.py)."""
    lengths = (end_offset - start_offset).tolist()
    spans = zip(
        *(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist()),
        out_cache_loc.split(lengths),
        strict=True,
    )
    for row, start, end, slots in spans:
        req_to_token[row, start:end] = slots.to(req_to_token.dtype)


def front_slots(
    num_front: torch.Tensor, out_cache_loc: torch.Tensor, front_out_cache_loc: torch.Tensor
) -> None:
    """The first slots of each request's window, so many (kernels/ops/speculative/cache_locs.py)."""
    window = out_cache_loc.view(len(num_front), -1)
    front = window[torch.arange(window.shape[1]) < num_front[:, None]]
    front_out_cache_loc[: len(front)] = front


def accepted_slots(
    accept_index: torch.Tensor,
    out_cache_loc: torch.Tensor,
    accept_out_cache_loc: torch.Tensor,
    size: int,
) -> None:
    """The slots of the accepted nodes (kernels/ops/speculative/eagle.py)."""
    slots = out_cache_loc[accept_index[accept_index != -1].long()]
    accept_out_cache_loc[: len(slots)] = slots
