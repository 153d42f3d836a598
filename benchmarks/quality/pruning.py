# SPDX-License-Identifier: Apache-2.0
"""Visual token pruning in Transformers, to compare with (the paper's table 4).

These methods drop tokens before or within the prefill, so that no later layer ever sees them; a KV
policy acts after it. They keep max(1, round(retention * N_v)) visual tokens, as AirCache's layers
do on average. Tokens keep their M-RoPE positions.

| | paper | drops | by |
|---|---|---|---|
| `fastv` | 2403.06764 | after decoder layer 2 | the last token's attention, mean over heads |
| `fastervlm` | 2412.01818 | before the decoder | attention within the vision tower's last block |
| `ivtp` | ECCV 2024 | before and within the decoder, see below | both |

Where they have to differ: Qwen2-VL's vision tower has no class token, whose attention FasterVLM and
IVTP rank by; here a token's score is the attention that it receives from all patches of its
picture. Of IVTP only the two stages are taken, without its grouping and rollout: the square root of
the retention is kept before the decoder, the rest of it after the decoder's first half, by the
attention of all instruction tokens.
"""

from __future__ import annotations

import base64
import io
import math
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, DynamicCache, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_vision,
)

from aircache_sglang.policy import columns
from benchmarks.quality.client import Answer
from benchmarks.quality.samples import Sample
from benchmarks.quality.settings import PRUNING, Setting

FASTV_LAYER = 2


@dataclass
class Prefilled:
    """logits: [vocabulary], of the first token. cache: the KV, as many tokens a layer as it kept.

    position: of the next token. kept: visual tokens that reach the last layer.
    """

    logits: torch.Tensor
    cache: DynamicCache
    position: int
    kept: int


class Pruner:
    """A Qwen2-VL checkpoint in float32 that answers under a pruning method.

    Raises:
        ValueError: a checkpoint of another family.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        if not Path(checkpoint).is_dir():
            raise ValueError(f"pruning runs in this process and needs a folder, got {checkpoint}")
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        if self.model.config.model_type != "qwen2_vl":
            raise ValueError(f"pruning is for qwen2_vl, got {self.model.config.model_type}")
        end = self.model.generation_config.eos_token_id
        self._ends = set(end if isinstance(end, list) else [end])
        self._lock = threading.Lock()

    def ask(self, sample: Sample, setting: Setting) -> Answer:
        """As the client asks a server; one sample at a time."""
        if sample.video is not None:
            raise ValueError(f"pruning takes pictures, and {sample.dataset} has videos")
        with self._lock:
            started = time.monotonic()
            inputs = self.encode(sample)
            done = self.prefill(inputs, setting.policy, setting.retention)
            ids = self._decode(done, sample.max_tokens)
            text = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
            report = {"visual_tokens": int((inputs["mm_token_type_ids"] != 0).sum())}
            report["columns"] = done.kept
            return Answer(text, (), report, time.monotonic() - started)

    def encode(self, sample: Sample) -> Any:
        """The model's inputs, `mm_token_type_ids` included."""
        images = [_decoded(url) for url in sample.pictures()]
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": sample.prompt}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        return self.processor(text=[text], images=images or None, return_tensors="pt")

    @torch.inference_mode()
    def prefill(self, inputs: Any, method: str, retention: float) -> Prefilled:
        """Run the prompt with what the method keeps.

        Raises:
            ValueError: an unknown method.
        """
        if method not in PRUNING:
            raise ValueError(f"the method must be one of {', '.join(PRUNING)}, got {method!r}")
        model, decoder = self.model.model, self.model.model.language_model
        ids, types, grid = (
            inputs[name] for name in ("input_ids", "mm_token_type_ids", "image_grid_thw")
        )
        positions, _ = model.get_rope_index(ids, types, image_grid_thw=grid)
        hidden = decoder.embed_tokens(ids)
        seen = self._see(inputs["pixel_values"], grid, score=method != "fastv")
        visual = types[0] != 0
        hidden[0, visual] = seen.embeddings
        n_visual = int(visual.sum())
        wanted = columns(retention, n_visual)
        before, layer_to_prune = n_visual, None
        if method == "fastervlm":
            before = wanted
        elif method == "ivtp":
            before = max(wanted, math.ceil(math.sqrt(retention) * n_visual))
            layer_to_prune = len(decoder.layers) // 2
        else:
            layer_to_prune = min(FASTV_LAYER, len(decoder.layers) - 1)
        next_position = int(positions.max()) + 1
        if before < n_visual:
            kept = _keep(visual, seen.scores, before)
            hidden, positions, visual = hidden[:, kept], positions[:, :, kept], visual[kept]
        cache = DynamicCache(config=decoder.config)
        rope = decoder.rotary_emb(hidden, positions)
        for i, layer in enumerate(decoder.layers):
            scores = None
            if layer_to_prune is not None and i == layer_to_prune - 1 and visual.sum() > wanted:
                first = int(visual.nonzero()[-1]) + 1 if method == "ivtp" else len(visual) - 1
                scores = _attention(layer, hidden, rope, first)[:, :, visual].mean(dim=(0, 1))
            hidden = layer(hidden, position_embeddings=rope, past_key_values=cache, use_cache=True)
            if scores is not None:
                kept = _keep(visual, scores, wanted)
                hidden, positions, visual = hidden[:, kept], positions[:, :, kept], visual[kept]
                rope = decoder.rotary_emb(hidden, positions)
        logits = self.model.lm_head(decoder.norm(hidden[:, -1]))[0]
        return Prefilled(logits, cache, next_position, int(visual.sum()))

    @torch.inference_mode()
    def _decode(self, done: Prefilled, max_tokens: int) -> list[int]:
        """Greedy token ids, without the one that ends."""
        decoder = self.model.model.language_model
        ids: list[int] = []
        logits = done.logits
        while len(ids) < max_tokens:
            token = int(logits.argmax())
            if token in self._ends:
                break
            ids.append(token)
            hidden = decoder.embed_tokens(torch.tensor([[token]]))
            position = torch.full((3, 1, 1), done.position + len(ids) - 1)
            rope = decoder.rotary_emb(hidden, position)
            for layer in decoder.layers:
                hidden = layer(
                    hidden, position_embeddings=rope, past_key_values=done.cache, use_cache=True
                )
            logits = self.model.lm_head(decoder.norm(hidden[:, -1]))[0]
        return ids

    def _see(self, pixels: torch.Tensor, grid: torch.Tensor, *, score: bool) -> _Seen:
        """The pictures' embeddings and, with `score`, what their patches' attention says."""
        tower = self.model.model.visual
        last: dict[str, Any] = {}

        def remember(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            last.update(named, hidden=arguments[0])

        hook = tower.blocks[-1].register_forward_pre_hook(remember, with_kwargs=True)
        try:
            embeddings = tower(pixels, grid_thw=grid).pooler_output
        finally:
            hook.remove()
        if not score:
            return _Seen(embeddings, torch.empty(0))
        block = tower.blocks[-1]
        n, heads = len(last["hidden"]), block.attn.num_heads
        q, k, _ = block.attn.qkv(block.norm1(last["hidden"])).view(n, 3, heads, -1).unbind(1)
        q, k = apply_rotary_pos_emb_vision(q, k, *last["position_embeddings"])
        received = []
        lengths = last["cu_seqlens"].diff().tolist()
        for one_q, one_k in zip(q.split(lengths), k.split(lengths), strict=True):
            logits = torch.einsum("qhd,khd->hqk", one_q, one_k) * block.attn.scaling
            received.append(logits.softmax(dim=-1).mean(dim=(0, 1)) * len(one_k))
        merged = tower.spatial_merge_size**2
        return _Seen(embeddings, torch.cat(received).view(-1, merged).mean(dim=1))


@dataclass
class _Seen:
    """embeddings: [N_v, hidden]. scores: [N_v], attention received, 1 on a picture's average."""

    embeddings: torch.Tensor
    scores: torch.Tensor


def _keep(visual: torch.Tensor, scores: torch.Tensor, count: int) -> torch.Tensor:
    """Positions [N - N_v + count], ascending, of all text and the `count` best visual tokens."""
    best = scores.sort(descending=True, stable=True).indices[:count]
    kept = ~visual
    kept[visual.nonzero().view(-1)[best]] = True
    return kept.nonzero().view(-1)


def _attention(layer: Any, hidden: torch.Tensor, rope: Any, first: int) -> torch.Tensor:
    """Causal attention [H_q, N - first, N] that `layer` will give in the rows from `first` on."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    n = hidden.shape[1]
    q = attention.q_proj(normed).view(1, n, -1, attention.head_dim).transpose(1, 2)
    k = attention.k_proj(normed).view(1, n, -1, attention.head_dim).transpose(1, 2)
    q, k = apply_rotary_pos_emb(q, k, *rope)
    k = k.repeat_interleave(attention.num_key_value_groups, dim=1)
    logits = q[0, :, first:] @ k[0].transpose(1, 2) * attention.scaling
    future = torch.ones(n, n, dtype=torch.bool).triu(1)[first:]
    return logits.masked_fill(future, float("-inf")).softmax(dim=-1)


def _decoded(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
