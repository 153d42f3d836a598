# SPDX-License-Identifier: Apache-2.0
"""The attention layers of SGLang's model, and what they must be."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

from aircache_sglang.runtime.stash import QUERY_ROWS


def attention_layers(model: torch.nn.Module) -> list[Any]:
    """The RadixAttention modules of the language model."""
    # SGLang's Transformers fallback keeps its layers in a plain dictionary.
    aside = getattr(model, "attention_instances", {}).values()
    return [m for m in (*model.modules(), *aside) if isinstance(m, RadixAttention)]


def attention_scale(layers: list[Any], policy: str) -> float:
    """The softmax scale that all attention layers share.

    Raises RuntimeError for layers that the compression pass would score, or decode, wrongly.
    """
    needs = f"--kv-policy {policy} needs"
    scales = {layer.scaling for layer in layers}
    if len(scales) != 1:
        raise RuntimeError(f"{needs} one softmax scale in all layers, found {sorted(scales)}")
    for layer in layers:
        factors = {getattr(layer, name, None) for name in ("k_scale_float", "v_scale_float")}
        if not factors <= {None, 1.0}:
            raise RuntimeError(
                f"{needs} a checkpoint without scale factors for KV, and layer {layer.layer_id} "
                f"has {sorted(factors, key=str)}; serve it without --kv-policy"
            )
        windowed = layer.sliding_window_size is not None and layer.sliding_window_size > -1
        if windowed or layer.logit_cap or layer.attn_type != AttentionType.DECODER:
            raise RuntimeError(
                f"{needs} causal attention over the whole context, without a window or a logit "
                f"cap; layer {layer.layer_id} has another"
            )
    return float(scales.pop())


def query_bytes(model_config: Any, tp_size: int) -> int:
    """Memory of one rank that the queries kept for the pass take at most (runtime/stash.py).

    model_config: SGLang's (configs/model_config.py).
    """
    heads = model_config.get_num_attention_heads(tp_size)
    # Of a hybrid model those that attend.
    attending = getattr(model_config.hf_text_config, "full_attention_layer_ids", None)
    layers = len(attending) if attending else model_config.num_hidden_layers
    row = layers * heads * model_config.head_dim
    return int(QUERY_ROWS * row * model_config.dtype.itemsize)


def ladder_share(model_config: Any, kv_dtype: torch.dtype, retention: float) -> float:
    """What packing under pressure needs beside a pool full of pictures, as a share of both.

    An int32 ordinal for each cell of the first rung (runtime/rungs.py), beside K and V.
    """
    beside = 4 * retention / (2 * model_config.head_dim * kv_dtype.itemsize)
    return float(beside / (1 + beside))
