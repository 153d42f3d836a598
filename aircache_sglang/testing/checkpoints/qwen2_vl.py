# SPDX-License-Identifier: Apache-2.0
"""A complete Qwen2-VL checkpoint with random weights, a few hundred kilobytes to a few megabytes.

The weights are not those of ``initializer_range``: queries and keys are scaled so that attention
is peaked, by a different amount in each layer, and only whole words can win a greedy step. Text
comes out readable, differs between pictures, and never ends by itself.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from aircache_sglang.testing.checkpoints.checkpoint import (
    QWEN_IMAGE,
    QWEN_VIDEO,
    write_chat_template,
    write_json,
    write_qwen_pixels,
)
from aircache_sglang.testing.checkpoints.vocabulary import SPECIAL_TOKENS, WORDS, build_tokenizer

PATCH = 14
MERGE = 2
PIXELS_PER_TOKEN = PATCH * MERGE  # per side: a picture of h x w gives (h / 28) * (w / 28) tokens
VISION_HEADS = 2
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # per channel, of OpenAI's CLIP
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def make_qwen2_vl(
    path: str | Path,
    *,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    intermediate_size: int | None = None,
    vision_depth: int = 2,
    vision_dim: int = 32,
    words: tuple[str, ...] = WORDS,
    bare_words: tuple[str, ...] = (),
    rope_theta: float = 1_000_000.0,
    mrope_section: tuple[int, int, int] | None = None,
    tie_word_embeddings: bool = False,
    vocab_size: int = 0,
    max_position_embeddings: int = 32_768,
    min_pixels: int = 56 * 56,
    max_pixels: int = 28 * 28 * 1280,
    attention_gain: float = 3.0,
    dtype: str = "float32",
    seed: int = 0,
    write_weights: bool = True,
) -> Path:
    """Write a checkpoint folder that SGLang and Transformers load, and return it.

    The hidden size is ``heads * head_dim``, as Qwen2-VL derives it. The same arguments give the
    same bytes. A picture of h x w pixels becomes round(h / 28) * round(w / 28) visual tokens within
    ``min_pixels`` and ``max_pixels`` (h * w after rounding).

    Args:
        path: folder to create or fill; existing files of the same names are overwritten.
        layers, heads, kv_heads, head_dim, intermediate_size: the decoder; ``kv_heads`` divides
            ``heads``, ``head_dim`` is a multiple of 16, ``intermediate_size`` defaults to twice
            the hidden size.
        vision_depth, vision_dim: blocks and width of the vision tower (2 heads).
        words: the words that the model can say; each is one token.
        bare_words: words that are one token without a leading space.
        rope_theta, mrope_section: of the rotary embedding; the section defaults to Qwen2-VL's
            proportions.
        vocab_size: rows of embedding and output layer, at least the tokenizer's and a multiple of
            64; 0 is the least. Dummy weights say those beyond it too, which decode to nothing.
        tie_word_embeddings: whether the output layer is the embedding.
        attention_gain: standard deviation of the attention logits, on average over layers.
        dtype: "float32", "bfloat16" or "float16": of the stored weights, and in the config.
        seed: of the weights.
        write_weights: False leaves them out, for ``--load-format dummy``.

    Raises:
        ValueError: a size that Qwen2-VL cannot have, an unknown dtype, or an empty word list.
    """
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}")
    if head_dim < 16 or head_dim % 16:
        raise ValueError(f"head_dim must be a multiple of 16, got {head_dim}")
    if layers < 1 or vision_depth < 1:
        raise ValueError(
            f"layers and vision_depth must be at least 1, got {layers} and {vision_depth}"
        )
    if vision_dim < 8 * VISION_HEADS or vision_dim % (4 * VISION_HEADS):
        raise ValueError(f"vision_dim must be a multiple of 8, at least 16, got {vision_dim}")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    if not words:
        raise ValueError("words must not be empty")

    hidden_size = heads * head_dim
    if intermediate_size is None:
        intermediate_size = 2 * hidden_size
    tokenizer, word_ids = build_tokenizer(tuple(words), bare=tuple(bare_words))
    # Tensor parallelism splits the vocabulary: keep it even.
    least = math.ceil(tokenizer.get_vocab_size() / 64) * 64
    vocab_size = vocab_size or least
    if vocab_size < least or vocab_size % 64:
        raise ValueError(f"vocab_size must be a multiple of 64, at least {least}, got {vocab_size}")

    def token_id(token: str) -> int:
        index = tokenizer.token_to_id(token)
        assert index is not None, token
        return int(index)

    half = head_dim // 2
    side = 3 * half // 8
    if mrope_section is None:
        mrope_section = (half - 2 * side, side, side)
    if sum(mrope_section) != half:
        raise ValueError(f"mrope_section must add up to {half}, got {mrope_section}")
    config: dict[str, Any] = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "attention_dropout": 0.0,
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
        "vision_token_id": token_id("<|vision_pad|>"),
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": max_position_embeddings,
        "max_window_layers": layers,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "mrope", "mrope_section": list(mrope_section)},
        "rope_theta": rope_theta,
        "sliding_window": max_position_embeddings,
        "tie_word_embeddings": tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": vision_depth,
            "embed_dim": vision_dim,
            "hidden_act": "quick_gelu",
            "hidden_size": hidden_size,
            "in_channels": 3,
            "in_chans": 3,  # SGLang reads this name, Transformers the other
            "mlp_ratio": 2,
            "num_heads": VISION_HEADS,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "spatial_patch_size": PATCH,
            "temporal_patch_size": 2,
        },
        "vocab_size": vocab_size,
    }

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json",
        {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    write_qwen_pixels(
        *(folder, "Qwen2VLProcessor", "Qwen2VL", PATCH, MERGE, (min_pixels, max_pixels)),
        mean=IMAGE_MEAN,
        std=IMAGE_STD,
    )
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            # As published; SGLang's benchmark client keeps them out of its random texts.
            "additional_special_tokens": list(SPECIAL_TOKENS),
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "model_max_length": max_position_embeddings,
            "pad_token": "<|endoftext|>",
            "processor_class": "Qwen2VLProcessor",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    write_chat_template(folder, QWEN_IMAGE, QWEN_VIDEO)
    tokenizer.save(str(folder / "tokenizer.json"))
    if write_weights:
        weights = _weights(config, word_ids, attention_gain, seed)
        torch_dtype: torch.dtype = getattr(torch, dtype)
        save_file(
            {name: weight.to(torch_dtype) for name, weight in weights.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
    return folder


def _weights(
    config: dict[str, Any], word_ids: list[int], attention_gain: float, seed: int
) -> dict[str, torch.Tensor]:
    """Random float32 tensors under their Hugging Face names; each depends on seed and name only."""
    weights: dict[str, torch.Tensor] = {}

    def normal(name: str, *shape: int, std: float) -> None:
        # The generator takes 32 bits of its seed.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        weights[name] = torch.randn(shape, generator=generator) * std

    def linear(name: str, rows: int, columns: int, *, gain: float = 1.0, bias: bool = True) -> None:
        normal(f"{name}.weight", rows, columns, std=gain / math.sqrt(columns))
        if bias:
            normal(f"{name}.bias", rows, std=0.1)

    def norm(name: str, size: int, *, bias: bool) -> None:
        weights[f"{name}.weight"] = torch.ones(size)
        if bias:
            weights[f"{name}.bias"] = torch.zeros(size)

    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = hidden // config["num_attention_heads"]
    kv_size = head_dim * config["num_key_value_heads"]
    layers = config["num_hidden_layers"]
    normal("model.embed_tokens.weight", config["vocab_size"], hidden, std=1.0)
    for i in range(layers):
        prefix = f"model.layers.{i}"
        norm(f"{prefix}.input_layernorm", hidden, bias=False)
        norm(f"{prefix}.post_attention_layernorm", hidden, bias=False)
        # Logits have the standard deviation gain**2; from half to one and a half of the average,
        # in an order that is neither rising nor falling.
        place = (i * 5 + 3) % layers / max(1, layers - 1)
        gain = math.sqrt(attention_gain * (0.5 + place))
        linear(f"{prefix}.self_attn.q_proj", hidden, hidden, gain=gain)
        linear(f"{prefix}.self_attn.k_proj", kv_size, hidden, gain=gain)
        linear(f"{prefix}.self_attn.v_proj", kv_size, hidden)
        linear(f"{prefix}.self_attn.o_proj", hidden, hidden, gain=1.5, bias=False)
        linear(f"{prefix}.mlp.gate_proj", inner, hidden, bias=False)
        linear(f"{prefix}.mlp.up_proj", inner, hidden, bias=False)
        linear(f"{prefix}.mlp.down_proj", hidden, inner, bias=False)
    norm("model.norm", hidden, bias=False)
    if not config["tie_word_embeddings"]:
        normal("lm_head.weight", config["vocab_size"], hidden, std=2.0 / math.sqrt(hidden))
        silent = torch.ones(config["vocab_size"], dtype=torch.bool)
        silent[word_ids] = False
        # Their logits stay near 0, below the best of hundreds of words.
        weights["lm_head.weight"][silent] *= 0.05

    vision = config["vision_config"]
    dim = vision["embed_dim"]
    inputs = vision["in_channels"] * vision["temporal_patch_size"] * PATCH * PATCH
    normal(
        "visual.patch_embed.proj.weight",
        *(dim, vision["in_channels"], vision["temporal_patch_size"], PATCH, PATCH),
        std=3.0 / math.sqrt(inputs),
    )
    for i in range(vision["depth"]):
        prefix = f"visual.blocks.{i}"
        norm(f"{prefix}.norm1", dim, bias=True)
        norm(f"{prefix}.norm2", dim, bias=True)
        linear(f"{prefix}.attn.qkv", 3 * dim, dim)
        linear(f"{prefix}.attn.proj", dim, dim, gain=0.5)
        linear(f"{prefix}.mlp.fc1", dim * vision["mlp_ratio"], dim)
        linear(f"{prefix}.mlp.fc2", dim, dim * vision["mlp_ratio"], gain=0.5)
    merged = dim * MERGE * MERGE
    norm("visual.merger.ln_q", dim, bias=True)
    linear("visual.merger.mlp.0", merged, merged)
    linear("visual.merger.mlp.2", hidden, merged, gain=1.7)
    return weights
