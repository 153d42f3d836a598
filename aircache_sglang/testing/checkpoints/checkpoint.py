# SPDX-License-Identifier: Apache-2.0
"""What the tiny checkpoints of all families share: sizes, weights, and the files around them.

The classes of Transformers give names and shapes; the numbers follow `qwen2_vl.py`: peaked
attention of a different strength in each layer, and only whole words can win a greedy step.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from aircache_sglang.testing.checkpoints.vocabulary import WORDS, build_tokenizer

MAX_POSITIONS = 32_768
CHATML = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}
IMAGE
{%- elif part['type'] in ('video', 'video_url') -%}
VIDEO
{%- elif part['type'] == 'text' -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"

_ATTENTION = re.compile(r"layers\.(\d+)\.self_attn\.(q_proj|k_proj|q_norm|k_norm)\.weight$")
_PROJECTOR = re.compile(r"(merger\.mlp\.2|merger\.linear_fc2|projector\.linear_2)\.weight$")
_DAMPED = re.compile(r"(proj|out_proj|projection_layer|fc2|down_proj)\.weight$")


class Words:
    """A tokenizer of whole words, and how to find its ids.

    size: rows of the embedding, a multiple of 64 so that tensor parallelism can split it.
    """

    def __init__(self, *extra: str) -> None:
        self.tokenizer: Tokenizer
        self.tokenizer, self.word_ids = build_tokenizer(WORDS, extra)
        self.size = math.ceil(self.tokenizer.get_vocab_size() / 64) * 64

    def id(self, token: str) -> int:
        index = self.tokenizer.token_to_id(token)
        assert index is not None, token
        return int(index)

    def text_config(self, **fields: Any) -> dict[str, Any]:
        """A decoder of 4 layers, 4 query heads, 2 KV heads of 16; ``fields`` change or add."""
        return {
            "bos_token_id": self.id("<|endoftext|>"),
            "eos_token_id": self.id("<|im_end|>"),
            "pad_token_id": self.id("<|endoftext|>"),
            "hidden_act": "silu",
            "hidden_size": 64,
            "intermediate_size": 128,
            "max_position_embeddings": MAX_POSITIONS,
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000.0,
            "tie_word_embeddings": False,
            "vocab_size": self.size,
        } | fields

    def qwen_tokens(self) -> dict[str, int]:
        """The special tokens that a Qwen*-VL config names."""
        return {
            "image_token_id": self.id("<|image_pad|>"),
            "video_token_id": self.id("<|video_pad|>"),
            "vision_start_token_id": self.id("<|vision_start|>"),
            "vision_end_token_id": self.id("<|vision_end|>"),
        }

    def write(
        self, folder: Path, *, image: str, video: str, processor_class: str | None, **fields: Any
    ) -> None:
        """Write the tokenizer and a ChatML template with these placeholders."""
        self.tokenizer.save(str(folder / "tokenizer.json"))
        write_json(
            folder / "tokenizer_config.json",
            {
                "add_prefix_space": False,
                "clean_up_tokenization_spaces": False,
                "eos_token": "<|im_end|>",
                "model_max_length": MAX_POSITIONS,
                "pad_token": "<|endoftext|>",
                "processor_class": processor_class,
                "tokenizer_class": "PreTrainedTokenizerFast",
            }
            | fields,
        )
        write_chat_template(folder, image, video)


def write_chat_template(folder: Path, image: str, video: str) -> None:
    template = CHATML.replace("IMAGE", image).replace("VIDEO", video)
    (folder / "chat_template.jinja").write_text(template)


def save_model(folder: Path, model_class: Any, config: Any, words: Words, *, seed: int = 0) -> Any:
    """Fill a model of Transformers with random weights and save it, config included."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        model = model_class(config)
    fill(model, words, seed=seed)
    model.save_pretrained(folder)
    return model


def save_weights(
    folder: Path,
    model_class: Any,
    config: Any,
    words: Words,
    *,
    seed: int = 0,
    renamed: Callable[[str], str] = str,
) -> None:
    """Weights alone, of a model that Transformers has no class of; `renamed` from our names."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        model = model_class(config)
    fill(model, words, seed=seed)
    weights = {renamed(name): weight.contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def fill(model: Any, words: Words, *, gain: float = 3.0, seed: int = 0) -> None:
    """Draw every parameter of a vision-language model; each depends on seed and name alone.

    gain: standard deviation of the decoder's attention logits, on average over layers.
    """
    layers = model.config.get_text_config().num_hidden_layers
    for name, weight in model.named_parameters():
        # The generator takes 32 bits of its seed.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        weight.copy_(_draw(name, weight.shape, generator, layers, gain))
    head = model.get_output_embeddings().weight
    silent = torch.ones(len(head), dtype=torch.bool)
    silent[words.word_ids] = False
    # Their logits stay near 0, below the best of hundreds of words.
    head[silent] *= 0.05


def _draw(
    name: str, shape: torch.Size, generator: torch.Generator, layers: int, gain: float
) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    visual = "vision" in name or "visual" in name
    attention = None if visual else _ATTENTION.search(name)
    share = 1.0
    if attention:
        # Logits have the standard deviation share**2; from half to one and a half of the average,
        # in an order that is neither rising nor falling.
        place = (int(attention[1]) * 5 + 3) % layers / max(1, layers - 1)
        share = math.sqrt(gain * (0.5 + place))
        if attention[2].endswith("norm"):
            return torch.full(shape, share)
    if name.endswith(".bias"):
        return noise * 0.1
    if "lambda_" in name:
        return torch.full(shape, 0.5)
    if len(shape) == 1 and name.endswith(".weight"):
        return torch.ones(shape)
    if name.endswith("lm_head.weight"):
        return noise * (2.0 / math.sqrt(shape[1]))
    if "embed_tokens" in name or "image_newline" in name:
        return noise
    if "patch_embed" in name:
        return noise * (3.0 / math.sqrt(math.prod(shape[1:])))
    if len(shape) == 1 or "embedding" in name or "pos_embed" in name or "cls_token" in name:
        return noise * 0.3
    if _PROJECTOR.search(name):
        share = 1.7
    elif visual:
        share = 0.5 if _DAMPED.search(name) else 1.0
    elif name.endswith("o_proj.weight"):
        share = 1.5
    return noise * (share / math.sqrt(shape[-1]))


def write_qwen_processor(
    folder: Path,
    words: Words,
    processor_class: str,
    kind: str,
    patch: int,
    merge: int,
    *,
    videos: str | None = None,
) -> None:
    """Processor, tokenizer and template of the Qwen*-VL families.

    A picture of h x w pixels becomes h * w / side**2 visual tokens, side = patch * merge, where
    both sides are multiples of it and the picture has 4 to 1,280 tokens.
    """
    bounds = (4 * (patch * merge) ** 2, 1280 * (patch * merge) ** 2)
    write_qwen_pixels(folder, processor_class, kind, patch, merge, bounds, videos=videos)
    words.write(folder, image=QWEN_IMAGE, video=QWEN_VIDEO, processor_class=processor_class)


def write_qwen_pixels(
    folder: Path,
    processor_class: str,
    kind: str,
    patch: int,
    merge: int,
    bounds: tuple[int, int],
    *,
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
    std: tuple[float, float, float] = (0.5, 0.5, 0.5),
    videos: str | None = None,
) -> None:
    """What becomes of pixels: bounds are a picture's fewest and most, mean and std per channel.

    kind, videos: whose processors read pictures and videos; the same one by default.
    """
    smallest, largest = bounds
    pixels = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "max_pixels": largest,
        "merge_size": merge,
        "min_pixels": smallest,
        "patch_size": patch,
        "processor_class": processor_class,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "size": {"shortest_edge": smallest, "longest_edge": largest},
        "temporal_patch_size": 2,
    }
    write_json(
        folder / "preprocessor_config.json",
        pixels | {"image_processor_type": f"{kind}ImageProcessor"},
    )
    write_json(
        folder / "video_preprocessor_config.json",
        pixels | {"video_processor_type": f"{videos or kind}VideoProcessor"},
    )


def edit_json(path: Path, **fields: Any) -> None:
    """Change fields of a JSON file, or create it."""
    content = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, content | fields)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
