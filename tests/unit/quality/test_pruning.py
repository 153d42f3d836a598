# SPDX-License-Identifier: Apache-2.0
"""The laws of the token-pruning comparators, on a tiny checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from aircache_sglang.testing import png_data_url
from aircache_sglang.testing.checkpoints import make_qwen2_vl
from aircache_sglang.testing.prompts import picture
from benchmarks.quality.pruning import Pruner
from benchmarks.quality.samples import Sample
from benchmarks.quality.settings import PRUNING, Setting

SAMPLE = Sample(
    *("ours", "value", "1", "what is in the pictures?", ("a",), "exact_match"),
    pictures=lambda: [png_data_url(picture(0, 5, 6)), png_data_url(picture(1, 4, 4))],
    max_tokens=5,
)
N_VISUAL = 5 * 6 + 4 * 4


@pytest.fixture(scope="module")
def pruner(tmp_path_factory: pytest.TempPathFactory) -> Pruner:
    return Pruner(make_qwen2_vl(tmp_path_factory.mktemp("pruning") / "qwen2-vl"))


@pytest.fixture(scope="module")
def inputs(pruner: Pruner) -> Any:
    return pruner.encode(SAMPLE)


@pytest.mark.parametrize("method", PRUNING)
def test_keeping_all_gives_the_models_own_answer(pruner: Pruner, inputs: Any, method: str) -> None:
    with torch.inference_mode():
        expected = pruner.model(**inputs).logits[0, -1]
        ids = pruner.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    done = pruner.prefill(inputs, method, 1.0)
    torch.testing.assert_close(done.logits, expected, rtol=0, atol=1e-4)
    answer = pruner.ask(SAMPLE, Setting.of(method, 1.0))
    new = ids[0, inputs["input_ids"].shape[1] :]
    assert answer.text == pruner.processor.tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("method", PRUNING)
def test_layers_hold_what_the_method_leaves_them(pruner: Pruner, inputs: Any, method: str) -> None:
    """m = 0.1 * 46 rounded; IVTP's first stage keeps the ceiling of sqrt(0.1) * 46."""
    text = inputs["input_ids"].shape[1] - N_VISUAL
    done = pruner.prefill(inputs, method, 0.1)
    visual = [layer.keys.shape[2] - text for layer in done.cache.layers]
    expected = {"fastv": [46, 46, 5, 5], "fastervlm": [5] * 4, "ivtp": [15, 15, 5, 5]}
    assert visual == expected[method] and done.kept == 5
    assert not torch.allclose(done.logits, pruner.prefill(inputs, method, 1.0).logits, atol=1e-2)


def recorded(
    module: torch.nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *_: Any,
    **named: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the vision tower that remembers its weights [H, n, n], a picture a call."""
    weights = (q @ k.transpose(2, 3) * named["scaling"]).softmax(dim=-1)
    RECORDED.append(weights[0])
    return (weights @ v).transpose(1, 2), weights


RECORDED: list[torch.Tensor] = []
AttentionInterface.register("recorded", recorded)


@pytest.mark.parametrize(("method", "layer"), [("fastv", 2), ("fastervlm", 0)])
def test_what_attention_ranks_first_is_kept(
    pruner: Pruner, inputs: Any, method: str, layer: int
) -> None:
    """The first pruned layer has the keys that the whole prompt gives the best tokens there."""
    model = type(pruner.model).from_pretrained(
        pruner.model.name_or_path,
        dtype=torch.float32,
        attn_implementation={"text_config": "eager", "vision_config": "recorded"},
    )
    RECORDED.clear()
    with torch.inference_mode():
        out = model(**inputs, output_attentions=True, use_cache=True)
    visual = (inputs["mm_token_type_ids"][0] != 0).nonzero().view(-1)
    if method == "fastv":
        scores = out.attentions[1][0, :, -1, visual].mean(dim=0)
    else:
        received = [w.mean(dim=(0, 1)) * w.shape[-1] for w in RECORDED[-2:]]
        scores = torch.cat(received).view(N_VISUAL, 4).mean(dim=1)
    dropped = visual[scores.argsort()[: N_VISUAL - 5]]
    kept = [i for i in range(inputs["input_ids"].shape[1]) if i not in dropped]
    torch.testing.assert_close(
        pruner.prefill(inputs, method, 0.1).cache.layers[layer].keys,
        out.past_key_values.layers[layer].keys[:, :, kept],
        rtol=0,
        atol=1e-4,
    )


def test_ivtp_prunes_twice(pruner: Pruner, inputs: Any) -> None:
    """15 tokens by the vision tower's attention, of these 5 by the instruction's in layer 1."""
    model = type(pruner.model).from_pretrained(
        pruner.model.name_or_path,
        dtype=torch.float32,
        attn_implementation={"text_config": "eager", "vision_config": "recorded"},
    )
    fed: dict[str, Any] = {}

    def remember(_: Any, __: Any, named: dict[str, Any]) -> None:
        fed.update(named)

    decoder = model.model.language_model
    hook = decoder.register_forward_pre_hook(remember, with_kwargs=True)
    RECORDED.clear()
    with torch.inference_mode():
        model(**inputs)
        hook.remove()
        received = [w.mean(dim=(0, 1)) * w.shape[-1] for w in RECORDED[-2:]]
        scores = torch.cat(received).view(N_VISUAL, 4).mean(dim=1)
        visual = inputs["mm_token_type_ids"][0] != 0
        first = ~visual
        first[visual.nonzero().view(-1)[scores.argsort(descending=True)[:15]]] = True
        # the last three rows: time, height, width; Transformers may put the text's before them
        out = decoder(
            inputs_embeds=fed["inputs_embeds"][:, first],
            position_ids=fed["position_ids"][-3:, :, first],
            output_attentions=True,
            use_cache=True,
        )
    seen = visual[first].nonzero().view(-1)
    votes = out.attentions[1][0, :, int(seen[-1]) + 1 :, seen].mean(dim=(0, 1))
    second = ~visual[first]
    second[seen[votes.argsort(descending=True)[:5]]] = True
    layers = pruner.prefill(inputs, "ivtp", 0.1).cache.layers
    for layer, kept in ((0, slice(None)), (1, slice(None)), (2, second)):
        torch.testing.assert_close(
            layers[layer].keys,
            out.past_key_values.layers[layer].keys[:, :, kept],
            rtol=0,
            atol=1e-4,
        )


def test_what_is_refused(pruner: Pruner, inputs: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fastv, fastervlm, ivtp, got 'aircache'"):
        pruner.prefill(inputs, "aircache", 0.5)
    with pytest.raises(ValueError, match="pictures, and mmbench-video has videos"):
        film = Sample("mmbench-video", "all", "1", "?", ("a",), "anls", video=tmp_path / "a.mp4")
        pruner.ask(film, Setting.of("fastv", 0.5))
