# SPDX-License-Identifier: Apache-2.0
"""The tiny checkpoints are complete, reproducible, and interesting enough to test with."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration

from aircache_sglang.testing.checkpoints import make_qwen2_vl
from aircache_sglang.testing.checkpoints.vocabulary import WORDS

QUESTION = "what is in the picture and which color has it?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2_vl(tmp_path_factory.mktemp("factory") / "model")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    model, info = Qwen2VLForConditionalGeneration.from_pretrained(
        checkpoint, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def inputs(checkpoint: Path, seed: int) -> Any:
    """One picture of 8 x 10 visual tokens and a question."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((280, 224))
    return processor(text=[prompt], images=[picture], return_tensors="pt")


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_same_seed_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    assert digests(make_qwen2_vl(tmp_path / "again")) == digests(checkpoint)
    other = digests(make_qwen2_vl(tmp_path / "other", seed=1))
    changed = {name for name, digest in digests(checkpoint).items() if other[name] != digest}
    assert changed == {"model.safetensors"}


def test_size(checkpoint: Path) -> None:
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) < 3_000_000


def test_transformers_answers_about_a_picture(checkpoint: Path, model: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    answers = []
    for seed in range(2):
        batch = inputs(checkpoint, seed)
        assert (batch["input_ids"] == model.config.image_token_id).sum() == 80
        with torch.inference_mode():
            output = model.generate(**batch, max_new_tokens=24, do_sample=False)
        new = output[0, batch["input_ids"].shape[1] :]
        assert len(new) == 24, "ended by itself"
        answers.append(tokenizer.decode(new).split())
    assert all(set(answer) <= set(WORDS) for answer in answers)
    assert all(len(set(answer)) >= 12 for answer in answers)
    assert answers[0] != answers[1]


def test_attention_is_peaked_and_uneven_over_layers(checkpoint: Path, model: Any) -> None:
    batch = inputs(checkpoint, 0)
    visual = batch["input_ids"][0] == model.config.image_token_id
    with torch.inference_mode():
        attentions = model(**batch, output_attentions=True).attentions
    rows = torch.stack([attention[0, :, -1, visual].mean(0) for attention in attentions])  # [L, N]
    share = rows.sum(-1)
    peak = rows.max(-1).values / rows.mean(-1)
    assert share.min() > 0.1
    assert peak.max() > 10
    assert peak.max() / peak.min() > 2


@pytest.mark.parametrize("text", ["describe the yellow house", " Übel 42 + 7\n\n", "日本"])
def test_tokenizer_round_trip(checkpoint: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize(" describe the") == ["Ġdescribe", "Ġthe"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 4, "kv_heads": 3}, "multiple of kv_heads, got 4 and 3"),
        ({"head_dim": 24}, "head_dim must be a multiple of 16, got 24"),
        ({"layers": 0}, "layers and vision_depth must be at least 1, got 0"),
        ({"vision_dim": 20}, "vision_dim must be a multiple of 8"),
        ({"dtype": "int8"}, "got 'int8'"),
        ({"words": ()}, "words must not be empty"),
    ],
)
def test_refusals(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_qwen2_vl(tmp_path, **change)
    assert not list(tmp_path.iterdir())


def test_other_shapes_load(tmp_path: Path) -> None:
    folder = make_qwen2_vl(
        tmp_path, layers=1, heads=2, kv_heads=1, head_dim=32, vision_depth=1, dtype="bfloat16"
    )
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    with torch.inference_mode():
        logits = model(**inputs(folder, 0)).logits
    assert torch.isfinite(logits).all()
