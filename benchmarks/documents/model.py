# SPDX-License-Identifier: Apache-2.0
"""The model that reads the pages: its shape, its first weights, its batches."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AttentionInterface, AutoTokenizer, Qwen2VLForConditionalGeneration

from aircache_sglang.testing.checkpoints import make_qwen2_vl
from aircache_sglang.testing.checkpoints.qwen2_vl import IMAGE_MEAN, IMAGE_STD
from benchmarks.documents.pages import CELL, CHARACTERS, render
from benchmarks.documents.questions import TEMPLATES, Document, wording

# Both sides of M-RoPE get high frequencies (which cell) and the width low ones (which content).
SHAPE: dict[str, Any] = {
    "layers": 6,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "vision_depth": 2,
    "vision_dim": 64,
    "rope_theta": 500.0,
    "mrope_section": (1, 4, 27),
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "max_pixels": CELL * CELL * 4096,
}
EMBEDDING_STD = 0.1
IGNORED = -100
GUIDED_FROM = 4  # layer; the one below is where a key is found, as long as the second is held
KEEP_EVERYTHING = 0.3  # share of the questions whose answers see the whole page
GUIDED_TOKENS = 5  # <|im_end|> to the end: whatever the wording, the question is known
# (layer, head): (logit of each pair of frequencies that see rows, columns; cells to the left).
KERNELS: dict[tuple[int, int], tuple[float, float, int]] = {
    (0, 0): (6.0, 36.0, 1),
    (0, 1): (6.0, 45.0, 2),
    (0, 2): (6.0, 50.0, 3),
    (0, 3): (10.0, 0.0, 0),
    (1, 0): (10.0, 0.0, 0),
    (1, 1): (0.0, 20.0, 0),
}


def write_untrained(folder: Path) -> None:
    """A checkpoint folder of the model's shape; its weights are placeholders."""
    texts = [re.sub(r"\{[a-z]+\}", " ", t) for kind in TEMPLATES.values() for t in kind]
    words = sorted({word for text in texts for word in re.findall(r"[a-z]+", text)})
    bare = sorted({re.findall(r"[a-z]+", text)[0] for text in texts} | {"user", "assistant"})
    make_qwen2_vl(folder, words=tuple(words), bare_words=tuple(bare), dtype="float16", **SHAPE)


def load(folder: Path) -> tuple[Qwen2VLForConditionalGeneration, Any]:
    """(model in float32, tokenizer) of a checkpoint folder."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    convolution = model.model.visual.patch_embed.proj

    def embed_patches(pixels: torch.Tensor) -> torch.Tensor:
        return functional.linear(pixels, convolution.weight.flatten(1), convolution.bias)

    # Kernel and stride are equal: one matrix product, many times faster on a CPU.
    model.model.visual.patch_embed.forward = embed_patches
    AttentionInterface.register("branches", branch_attention)
    model.model.language_model.config._attn_implementation = "branches"
    return model, AutoTokenizer.from_pretrained(folder)


def save(model: Qwen2VLForConditionalGeneration, template: Path, folder: Path) -> None:
    """The model as float16 safetensors, with the other files of `template`."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in template.iterdir():
        if file.suffix in (".json", ".jinja") and template != folder:
            shutil.copy(file, folder)
    partial = folder / "model.safetensors.partial"
    weights = {n: w.half().contiguous() for n, w in hub_weights(model).items()}
    save_file(weights, partial, metadata={"format": "pt"})
    partial.rename(folder / "model.safetensors")


def hub_weights(model: Qwen2VLForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The weights under the names that published Qwen2-VL checkpoints have."""
    names = (("model.language_model.", "model."), ("model.visual.", "visual."))
    found = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        for ours, theirs in names:
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
                break
        found[name] = weight.detach()
    return found


@torch.no_grad()
def initialise(model: Qwen2VLForConditionalGeneration, seed: int) -> None:
    """First weights.

    The heads of the first layer begin as relative-position kernels (one, two, three cells to the
    left in the same row; the same row), two of the second as the same row and the same column:
    every question needs these, and `Hold` keeps them. The others begin as Trockman and Kolter's
    mimetic heads (arXiv 2305.09828): what is alike attends to each other, and what is attended to
    is copied.
    """
    generator = torch.Generator().manual_seed(seed)
    decoder = model.model.language_model
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            scales = ("norm" in name or "ln_q" in name) and name.endswith("weight")
            weight.fill_(1.0 if scales else 0.0)
        else:
            weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
    decoder.embed_tokens.weight.normal_(0, EMBEDDING_STD, generator=generator)
    section, theta = SHAPE["mrope_section"], SHAPE["rope_theta"]
    heads, groups, half = SHAPE["heads"], SHAPE["kv_heads"], SHAPE["head_dim"] // 2
    frequency = theta ** (-torch.arange(half) / half)
    down = slice(section[0], section[0] + section[1])
    right = slice(down.stop, down.stop + 8)
    slow = int((frequency > 0.02).sum())
    for index, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        # Every sublayer adds less than the embedding holds.
        layer.mlp.down_proj.weight.normal_(0, 0.004, generator=generator)
        out = attention.o_proj.weight.normal_(0, 0.006, generator=generator)
        q, q_bias = (
            tensor.view(heads, 2 * half, -1)
            for tensor in (attention.q_proj.weight, attention.q_proj.bias)
        )
        k, k_bias = (
            tensor.view(groups, 2 * half, -1)
            for tensor in (attention.k_proj.weight, attention.k_proj.bias)
        )
        v = attention.v_proj.weight.view(groups, 2 * half, -1)
        for head in range(heads):
            group = head * groups // heads
            kernel = KERNELS.get((index, head))
            columns = out[:, head * 2 * half : (head + 1) * 2 * half]
            if kernel is None:
                # Content is compared where the rotation is slow, so that distance does not matter.
                q[head] *= 0.3
                for dims in (slice(slow, half), slice(half + slow, None)):
                    q[head, dims] = 1.5 * k[group, dims]
                columns[:] = 0.2 * v[group].T
                continue
            # What it brings is as large as what stands in a cell.
            columns *= 1.7
            # A kernel's keys are nearly the same everywhere.
            q[head] *= 0.1
            k[group].clamp_(-0.003, 0.003)
            for part, logit, left in ((down, kernel[0], 0), (right, kernel[1], kernel[2])):
                size = 16.0  # of the keys' side
                angle = -left * frequency[part]
                wanted = logit * math.sqrt(2 * half) / size
                k_bias[group, part] = size
                q_bias[head, part, 0] = wanted * angle.cos()
                q_bias[head, half + part.start : half + part.stop, 0] = wanted * angle.sin()


class Hold:
    """Keeps the heads of KERNELS as `initialise` made them: no gradient reaches them.

    As long as nothing reads what they bring, their gradients are noise that takes it away: the
    model would then know a key by one character, as it can no longer see the others. What the
    second layer's heads look for in a row or a column they must learn, once the rest can use it.
    """

    def __init__(self, model: Qwen2VLForConditionalGeneration) -> None:
        self._learned: list[list[torch.Tensor]] = []
        shared = SHAPE["heads"] // SHAPE["kv_heads"]
        for index, layer in enumerate(model.model.language_model.layers):
            held = torch.zeros(SHAPE["heads"], dtype=torch.bool)
            held[[head for at, head in KERNELS if at == index]] = True
            attention, groups = layer.self_attn, held.view(-1, shared).all(-1)
            queries, keys = (
                (~heads).repeat_interleave(SHAPE["head_dim"]).float() for heads in (held, groups)
            )
            self._learned.append([queries, keys])
            attention.o_proj.weight.register_hook(functools.partial(torch.mul, queries))
            for projection, learned in (
                (attention.q_proj, queries),
                (attention.k_proj, keys),
                (attention.v_proj, keys),
            ):
                projection.weight.register_hook(functools.partial(torch.mul, learned[:, None]))
                projection.bias.register_hook(functools.partial(torch.mul, learned))

    def release(self) -> None:
        """Let all layers but the first learn."""
        for learned in self._learned[1:]:
            for share in learned:
                share.fill_(1)


def patches(pages: np.ndarray) -> torch.Tensor:
    """Pixels [B, H, W, 3] uint8 as the processor's patches, [B * cells * 4, 3 * 2 * 14 * 14]."""
    mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
    pixels = (torch.from_numpy(pages).float() / 255 - mean) / std
    b, h, w, _ = pixels.shape
    p = CELL // 2
    cut = pixels.view(b, h // CELL, 2, p, w // CELL, 2, p, 3)
    cut = cut.permute(0, 1, 4, 2, 5, 7, 3, 6)  # b, row, column, merge, merge, channel, y, x
    cut = cut.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
    return cut.reshape(b * (h // p) * (w // p), -1)


def see(model: Qwen2VLForConditionalGeneration, pages: np.ndarray) -> torch.Tensor:
    """Visual embeddings [B, cells, hidden] of pages [B, H, W, 3] uint8."""
    b, h, w, _ = pages.shape
    grid = torch.tensor([[1, 2 * h // CELL, 2 * w // CELL]]).expand(b, -1)
    seen = model.model.visual(patches(pages), grid_thw=grid).pooler_output
    return seen.view(b, (h // CELL) * (w // CELL), -1)


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Documents of one layout, each with several questions that do not see each other.

    pages: uint8 [B, pages, H, W, 3]; text: int64 [B, Q, T] questions and answers, padded;
    targets: int64 [B, Q, T], IGNORED outside the answers, already shifted; evidence: bool
    [B, Q, cells of all pages], where the answer stands.
    """

    pages: np.ndarray
    text: torch.Tensor
    targets: torch.Tensor
    evidence: torch.Tensor


def make_batch(
    documents: list[Document], questions: int, kind: str, tokenizer: Any, generator: Any
) -> Batch:
    """Render the documents and draw `questions` questions about each."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    rows, drawn, places = [], [], []
    for made in documents:
        drawn.append(np.stack([render(sheet, generator) for sheet in made.sheets]))
        chosen = generator.choice(len(made.asks), questions, replace=len(made.asks) < questions)
        for index in chosen:
            ask = made.asks[index]
            prompt = f"{wording(kind, ask.slots, generator)}<|im_end|>\n<|im_start|>assistant\n"
            asked = tokenizer.encode(prompt, add_special_tokens=False)
            rows.append((asked, [*tokenizer.encode(ask.answer, add_special_tokens=False), end]))
            page, row, column = ask.place
            cells = torch.zeros(len(made.sheets), *made.sheets[0].shape, dtype=torch.bool)
            cells[page, row, column : column + len(ask.answer)] = True
            places.append(cells.flatten())
    width = max(len(asked) + len(answer) for asked, answer in rows) - 1
    text = torch.full((len(rows), width), end)
    targets = torch.full((len(rows), width), IGNORED)
    for i, (asked, answer) in enumerate(rows):
        whole = torch.tensor(asked + answer)
        text[i, : len(whole) - 1] = whole[:-1]
        targets[i, len(asked) - 1 : len(whole) - 1] = torch.tensor(answer)
    shape = (len(documents), questions, width)
    evidence = torch.stack(places).view(*shape[:2], -1)
    return Batch(np.stack(drawn), text.view(shape), targets.view(shape), evidence)


def embed(
    model: Qwen2VLForConditionalGeneration, batch: Batch, tokenizer: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(embeddings [B, S, hidden], M-RoPE positions [3, 1, S], which of the prefix is visual).

    The pages come first, then the questions side by side, each in the place that it would have
    if it stood there alone.
    """
    b, n_pages, height, width, _ = batch.pages.shape
    rows, columns = height // CELL, width // CELL
    seen = see(model, batch.pages.reshape(b * n_pages, height, width, 3))
    seen = seen.view(b, n_pages, rows * columns, -1)
    lookup = model.model.language_model.embed_tokens

    def tokens(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer.encode(text, add_special_tokens=False))

    parts, positions, at = [], [], 0
    cell = torch.arange(rows * columns)
    grid = torch.stack((torch.zeros_like(cell), cell // columns, cell % columns))
    for page in range(n_pages):
        before = "<|vision_end|><|vision_start|>" if page else "<|im_start|>user\n<|vision_start|>"
        ids = tokens(before)
        parts += [lookup(ids).expand(b, -1, -1), seen[:, page]]
        positions += [at + torch.arange(len(ids)).expand(3, -1), at + len(ids) + grid]
        at += len(ids) + max(rows, columns)
    ids = tokens("<|vision_end|>")
    parts.append(lookup(ids).expand(b, -1, -1))
    positions.append(torch.full((3, 1), at))
    visual = torch.cat([torch.full((part.shape[1],), i % 2 == 1) for i, part in enumerate(parts)])
    _, n_questions, length = batch.text.shape
    parts.append(lookup(batch.text).flatten(1, 2))
    positions.append((at + 1 + torch.arange(length)).repeat(n_questions).expand(3, -1))
    return torch.cat(parts, 1), torch.cat(positions, 1).unsqueeze(1), visual


class Guide:
    """Makes a small model look at its evidence, and at little else, as large ones do.

    Models trained on real pictures come to look at their evidence before they speak, and hardly
    miss the tokens that no answer needs. A model this small looks up one character at a time, so
    that no policy that watches the instruction could know what the answer will read. Two things
    change that, both blind to policies: `loss` draws the attention of the prompt's last tokens to
    where the answer stands, and answers are learned with visual KV dropped at random, the answer's
    own cells excepted (below the guided layers: not excepted).
    """

    def __init__(
        self, batch: Batch, visual: torch.Tensor, seed: int | None, first: int = GUIDED_FROM
    ) -> None:
        """seed: of what is dropped; None drops nothing. first: the lowest guided layer."""
        self._first = first
        last = (batch.targets != IGNORED).int().argmax(-1)  # [B, Q], the prompt's last token
        self._rows = last[:, :, None] - torch.arange(GUIDED_TOKENS)
        self._visual = visual.nonzero().view(-1)
        self._wanted = batch.evidence / batch.evidence.sum(-1, keepdim=True)
        self._losses: list[torch.Tensor] = []
        self._random = None if seed is None else torch.Generator().manual_seed(seed)
        length = batch.text.shape[2]
        self._answers = (torch.arange(length) > last[:, :, None])[:, None, :, None, :, None]
        self._evidence = torch.zeros(*last.shape, len(visual), dtype=torch.bool)
        self._evidence[..., self._visual] = batch.evidence
        self._text = ~visual
        if self._random is not None:
            keep = torch.rand(last.shape, generator=self._random)
            everything = torch.rand(last.shape, generator=self._random) < KEEP_EVERYTHING
            self._keep = torch.where(everything, 1.0, keep**3)[:, None, :, None]

    def __call__(self, logits: torch.Tensor, layer: int) -> torch.Tensor:
        """Logits [B, H_kv, Q, group, T, prefix] of a layer, -inf where an answer sees nothing."""
        b, h, q, _, _, prefix = logits.shape
        if layer >= self._first:
            # One query head of each KV group; the others look where they need to.
            index = self._rows[:, None, :, :, None].expand(b, h, q, GUIDED_TOKENS, prefix)
            cells = logits[:, :, :, 0].gather(3, index)[..., self._visual].log_softmax(-1)
            self._losses.append(-(cells * self._wanted[:, None, :, None]).sum(-1).mean())
        if self._random is None:
            return logits
        kept = torch.rand((b, h, q, prefix), generator=self._random) < self._keep
        kept |= self._text
        if layer >= self._first:
            kept |= self._evidence[:, None]
        return logits.masked_fill(self._answers & ~kept[:, :, :, None, None], -torch.inf)

    def loss(self) -> torch.Tensor:
        """Mean cross entropy between the attention among visual cells and the answer's cells."""
        return torch.stack(self._losses).mean()


def branch_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    prefix: int,
    branches: int,
    guide: Guide | None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention in a prefix, and of each branch to the prefix and to itself.

    query: [B, H_q, S, D]; key, value: [B, H_kv, S, D]; S = prefix + branches * T. Returns
    [B, S, H_q, D], as Transformers' attention functions do.
    """
    b, h_q, s, d = query.shape
    h = key.shape[1]
    group, length = h_q // h, (s - prefix) // branches
    # Logits of hundreds: bfloat16 would round them to whole numbers.
    q, key = query.float().view(b, h, group, s, d) * scaling, key.float()
    k, v = key[:, :, :prefix], value[:, :, :prefix]

    def logits(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return queries @ keys.transpose(-1, -2)

    with torch.autocast("cpu", enabled=False):
        first = functional.scaled_dot_product_attention(
            query[:, :, :prefix].float(),
            k,
            v.float(),
            is_causal=True,
            scale=scaling,
            enable_gqa=True,
        ).to(value.dtype)
    # [B, H_kv, branch, group * T, D]: a branch's keys serve all queries of the group.
    own_q = q[..., prefix:, :].reshape(b, h, group, branches, length, d).transpose(2, 3)
    own_k = key[:, :, prefix:].reshape(b, h, branches, length, d)
    own_v = value[:, :, prefix:].reshape(b, h, branches, length, d)
    shared = logits(own_q.reshape(b, h, -1, d), k)
    own = logits(own_q.reshape(b, h, branches, group * length, d), own_k)
    above = torch.ones(length, length, dtype=torch.bool).triu(1)
    own = own.view(b, h, branches, group, length, length).masked_fill(above, -torch.inf)
    if guide is not None:
        shared = guide(shared.view(b, h, branches, group, length, prefix), module.layer_idx)
    scores = torch.cat((shared.view(b, h, -1, prefix), own.view(b, h, -1, length)), -1)
    to_prefix, to_own = scores.softmax(-1).to(value.dtype).split((prefix, length), -1)
    second = to_prefix @ v
    own = to_own.reshape(b, h, branches, group * length, length) @ own_v
    second = second + own.view(b, h, -1, d)
    second = second.view(b, h, branches, group, length, d).transpose(2, 3).reshape(b, h_q, -1, d)
    return torch.cat((first, second), 2).transpose(1, 2), None


def answer_logits(
    model: Qwen2VLForConditionalGeneration,
    batch: Batch,
    tokenizer: Any,
    *,
    dtype: torch.dtype,
    drop: int | None = None,
    guide_from: int | None = GUIDED_FROM,
) -> tuple[torch.Tensor, torch.Tensor, Guide | None]:
    """(logits [N, vocabulary], targets [N], guide) at the N answer tokens of a batch.

    drop: seed of the visual KV that the answers do not see; None shows all. guide_from: the lowest
    guided layer; None for no guide at all, which drops nothing.
    """
    embeddings, positions, visual = embed(model, batch, tokenizer)
    guide = None if guide_from is None else Guide(batch, visual, drop, guide_from)
    prefix = len(visual)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        hidden = model.model.language_model(
            inputs_embeds=embeddings,
            position_ids=positions.expand(3, len(embeddings), -1),
            attention_mask={"full_attention": None},
            use_cache=False,
            prefix=prefix,
            branches=batch.text.shape[1],
            guide=guide,
        ).last_hidden_state
    targets = batch.targets.flatten(1)
    wanted = targets != IGNORED
    return model.lm_head(hidden[:, prefix:][wanted].float()), targets[wanted], guide


def character_ids(tokenizer: Any) -> torch.Tensor:
    """The token of each character of CHARACTERS."""
    return torch.tensor([tokenizer.encode(c, add_special_tokens=False)[0] for c in CHARACTERS])
