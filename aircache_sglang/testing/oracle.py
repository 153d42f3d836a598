# SPDX-License-Identifier: Apache-2.0
"""What a compressing server must answer, computed by Transformers in float32.

The prompt is prefilled in full; the tokens that the server generated are then fed to the model
under a mask that hides, in each layer and from each KV head, the visual cells that the server says
it dropped. That mask is built from the answer alone; whether the policy would have kept the same
cells is a check of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AttentionInterface, AutoProcessor, Qwen2VLForConditionalGeneration

from aircache_sglang import policy
from aircache_sglang.config import INSTRUCTION_LIMIT
from aircache_sglang.testing.prompts import Prompt

# Seen: 2e-5, compressed or not; 0.9 with one wrong cell in each layer and head.
LOGPROB_TOLERANCE = 1e-4

# selection[layer][kv_head]: ordinals of the kept visual tokens, counted over all pictures.
Selection = Sequence[Sequence[Sequence[int]]]

_ATTENTION = "visible_cells"


@dataclasses.dataclass
class _Forward:
    """One forward: which cells each row may see, and what attention was given, of attending layers.

    The model's number of each of them is its key in `visible`.
    """

    visible: dict[int, torch.Tensor]  # bool [H_kv, S, S]
    q: list[torch.Tensor] = dataclasses.field(default_factory=list)  # per layer [H_q, S, D]
    k: list[torch.Tensor] = dataclasses.field(default_factory=list)  # per layer [H_kv, S, D]
    v: list[torch.Tensor] = dataclasses.field(default_factory=list)  # as k


_current: _Forward | None = None


@contextlib.contextmanager
def _running(forward: _Forward) -> Iterator[None]:
    global _current
    _current = forward
    try:
        yield
    finally:
        _current = None


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Softmax attention of one layer under its own mask; query [1, H_q, S, D], key [1, H_kv, S, D].

    Transformers' mask is the same for all layers and heads and is not used.
    """
    assert _current is not None and query.shape[0] == 1
    _current.q.append(query[0])
    _current.k.append(key[0])
    _current.v.append(value[0])
    group = query.shape[1] // key.shape[1]
    logits = query[0] @ key[0].repeat_interleave(group, dim=0).transpose(1, 2) * scaling
    layer: Any = module.layer_idx
    visible = _current.visible[layer].repeat_interleave(group, dim=0)
    weights = logits.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    out = weights @ value[0].repeat_interleave(group, dim=0)
    return out.transpose(0, 1)[None], None


AttentionInterface.register(_ATTENTION, _attention)


@dataclasses.dataclass(frozen=True)
class Trace:
    """The oracle's answer to one request.

    logprobs: float32 [T, vocabulary], row i is the distribution that token i was drawn from.
    q: [L, N, H_q, D], k and v: [L, N, H_kv, D] of the prompt's N tokens, after RoPE.
    visual: int64 [N_v], positions of the visual tokens.
    unified: all tokens of the prompt could be evicted.
    """

    logprobs: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    visual: torch.Tensor
    unified: bool = False

    @property
    def audience(self) -> torch.Tensor:
        """int64, positions of the tokens that could be evicted."""
        return torch.arange(self.q.shape[1]) if self.unified else self.visual

    @property
    def instruction(self) -> slice:
        """Positions of the text after the last visual token."""
        return slice(int(self.visual[-1]) + 1, self.q.shape[1])


class Oracle:
    """A Qwen2-VL checkpoint in Transformers, float32.

    tolerance: how far a server's logprobs may be from its own.
    """

    tolerance = LOGPROB_TOLERANCE

    def __init__(self, checkpoint: str | Path) -> None:
        self.checkpoint = checkpoint
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.model = self._load({"text_config": _ATTENTION, "vision_config": "sdpa"})
        self.text_config = self.model.config.get_text_config()
        kinds = getattr(self.text_config, "layer_types", None) or ["full_attention"]
        # Of a hybrid model the layers with a recurrent state see no mask.
        if "linear_attention" in kinds:
            self.attending = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        else:
            self.attending = list(range(self.text_config.num_hidden_layers))

    def _load(self, attention: str | dict[str, str]) -> Any:
        return Qwen2VLForConditionalGeneration.from_pretrained(
            self.checkpoint, dtype=torch.float32, attn_implementation=attention
        ).eval()

    def stock_model(self) -> Any:
        """The model with Transformers' own attention, to test the oracle itself."""
        return self._load("sdpa")

    def encode(self, text: str, images: Sequence[Image.Image] = ()) -> Any:
        """A prompt with one <|image_pad|> a picture as the model's inputs; input_ids [1, N]."""
        return self.processor(text=[text], images=list(images) or None, return_tensors="pt")

    def inputs(self, prompt: Prompt) -> Any:
        """The model's inputs for a prompt, with `mm_token_type_ids` (0 is text)."""
        return self.encode(prompt.text, prompt.images)

    @torch.inference_mode()
    def run(
        self,
        inputs: Any,
        tokens: Sequence[int],
        selection: Selection | None = None,
        *,
        unified: bool = False,
        packs: Sequence[tuple[int, Selection]] = (),
    ) -> Trace:
        """Prefill ``inputs`` in full, then decode ``tokens`` with only the selection visible.

        One forward stands for the prefill and all decode steps: the rows of the prompt see the
        whole prompt before them, the rows of the generated tokens only what was kept of it.
        ``selection`` None keeps every cell; ``unified``: its ordinals count all tokens.
        ``packs``: selections that hold from the token of that index on, in place of one.
        """
        if selection is not None:
            packs = [(1, selection)]
        n_prompt, n_tokens = inputs["input_ids"].shape[1], len(tokens)
        visual = (inputs["mm_token_type_ids"][0] != 0).nonzero().view(-1)
        audience = torch.arange(n_prompt) if unified else visual
        forward = _Forward(self._visible(n_prompt, n_tokens, audience, packs))
        # The last token is never fed back.
        fed = torch.tensor([list(tokens[:-1])], dtype=torch.long)
        # What is left are the pictures, and the token types if the model asks for them.
        ours = ("input_ids", "attention_mask", "mm_token_type_ids")
        arguments = {key: value for key, value in inputs.items() if key not in ours}
        if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:
            types = inputs["mm_token_type_ids"]
            arguments["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(fed)], dim=1)
        with _running(forward):
            output = self.model(
                input_ids=torch.cat([inputs["input_ids"], fed], dim=1),
                logits_to_keep=n_tokens,
                use_cache=False,
                **arguments,
            )
        assert len(forward.q) == len(self.attending)
        return Trace(
            logprobs=output.logits[0].float().log_softmax(dim=-1),
            q=torch.stack(forward.q)[:, :, :n_prompt].transpose(1, 2),
            k=torch.stack(forward.k)[:, :, :n_prompt].transpose(1, 2),
            v=torch.stack(forward.v)[:, :, :n_prompt].transpose(1, 2),
            visual=visual,
            unified=unified,
        )

    def _visible(
        self,
        n_prompt: int,
        n_tokens: int,
        audience: torch.Tensor,
        packs: Sequence[tuple[int, Selection]],
    ) -> dict[int, torch.Tensor]:
        """Per layer, bool [H_kv, S, S]: causal, and no dropped cell for the generated tokens."""
        layers, heads = len(self.attending), self.text_config.num_key_value_heads
        total = n_prompt + n_tokens - 1
        causal = torch.ones(total, total, dtype=torch.bool).tril()
        masks = [causal.repeat(heads, 1, 1) for _ in range(layers)]
        for first, selection in packs:
            if len(selection) != layers or any(len(layer) != heads for layer in selection):
                raise ValueError(
                    f"selection must have {layers} layers of {heads} KV heads, "
                    f"got {[len(layer) for layer in selection]}"
                )
            for visible, layer in zip(masks, selection, strict=True):
                for head, kept in enumerate(layer):
                    dropped = torch.ones(len(audience), dtype=torch.bool)
                    dropped[list(kept)] = False
                    # Token i is drawn from the row of token i - 1.
                    visible[head, n_prompt + first - 1 :, audience[dropped]] = False
        return dict(zip(self.attending, masks, strict=True))


def logprob_error(trace: Trace, meta_info: dict[str, Any], *, first: int = 0) -> float:
    """The largest difference between a server's logprobs and the oracle's, from a step on.

    Over the generated tokens and, where the answer holds them, the top logprobs of each step.
    """
    steps = meta_info["output_token_logprobs"]
    if len(steps) != len(trace.logprobs):
        raise ValueError(f"{len(steps)} steps of the server, {len(trace.logprobs)} of the oracle")
    top = meta_info.get("output_top_logprobs") or [[]] * len(steps)
    return max(
        abs(value - float(row[token]))
        for row, step, others in list(zip(trace.logprobs, steps, top, strict=True))[first:]
        for value, token, _ in (step, *others)
    )


def assert_agrees(oracle: Oracle, prompt: Prompt, answer: Any, *, greedy: bool = True) -> Trace:
    """Check a server's answer, compressed (with its selection) or not, at every step."""
    meta_info, tokens = answer["meta_info"], answer["output_ids"]
    inputs = oracle.inputs(prompt)
    assert meta_info["prompt_tokens"] == inputs["input_ids"].shape[1]
    report = meta_info["aircache"]
    unified = report is not None and report.get("audience") == "all"
    packs = packs_of(report)
    trace = oracle.run(inputs, tokens, unified=unified, packs=packs)
    first = 0
    if meta_info.get("num_retractions"):
        # What it had said before its last life was decoded otherwise; its last token was not.
        last = len(tokens) - 1
        first = min(packs[0][0], last) if packs else last
    error = logprob_error(trace, meta_info, first=first)
    assert error < oracle.tolerance, f"logprobs differ by {error:.2e}"
    if greedy and not first:
        chosen = trace.logprobs[torch.arange(len(tokens)), torch.tensor(tokens)]
        assert (chosen > trace.logprobs.amax(dim=1) - 2 * oracle.tolerance).all()
    if report is not None:
        assert report["visual_tokens"] == len(trace.audience)
    return trace


def packs_of(report: dict[str, Any] | None) -> list[tuple[int, Selection]]:
    """What a report says was visible, from which token of the answer on."""
    if report is None:
        return []
    steps = report.get("packs", [report] if report["packed_at"] is not None else [])
    return [(step["packed_at"], step["selection"]) for step in steps]


def assert_policy_agrees(
    trace: Trace,
    report: dict[str, Any],
    *,
    alpha: float = 0.9,
    elite: str = "per-head",
    window: int = INSTRUCTION_LIMIT,
    budget: str = "global",
) -> None:
    """Check budgets and selection against the policy, given Transformers' own queries and keys.

    Cells whose scores are within 0.1 % of the least kept one are ties: the two engines round
    differently.
    """
    text = trace.instruction
    scores = torch.stack(
        [
            policy.importance(
                *(q[text], k[text], k[trace.audience]),
                alpha=alpha,
                elite=elite,
                window=window,
                unified=trace.unified,
            )
            for q, k in zip(trace.q, trace.k, strict=True)
        ]
    )
    budgets = policy.layer_budgets(scores, report["retention"], budget=budget).tolist()
    assert report["instruction_tokens"] == min(window, text.stop - text.start)
    assert_keeps_the_best(report, scores, budgets)


def assert_keeps_the_best(
    report: dict[str, Any], scores: torch.Tensor, budgets: Sequence[int]
) -> None:
    """Check a report's budgets, and that it kept the highest scores, float32 [L, H_kv, N_v]."""
    assert report["layer_budgets"] == budgets
    for layer, kept_by_head in enumerate(report["selection"]):
        for score, kept in zip(scores[layer], kept_by_head, strict=True):
            assert kept == sorted(set(kept)) and len(kept) == budgets[layer]
            least = score.topk(len(kept)).values[-1]
            is_kept = torch.zeros(len(score), dtype=torch.bool)
            is_kept[kept] = True
            assert (score[is_kept] >= least * (1 - 1e-3)).all(), f"layer {layer}"
            assert (score[~is_kept] <= least * (1 + 1e-3)).all(), f"layer {layer}"


def policy_budgets(
    chosen: policy.Policy, statistics: torch.Tensor, scores: torch.Tensor, m: int
) -> torch.Tensor:
    """A policy's budgets of m columns, int64 [L], with the scores of all heads [L, H_kv, N_v]."""
    n_layers, n_kv, n_visual = scores.shape
    if chosen.global_budgets:
        statistics = policy.global_counts(scores, n_layers * n_kv * m)[None]
    return chosen.budgets(statistics, n_visual, m)


def policy_states(trace: Trace, *, visual_window: int = 0) -> policy.States:
    """All that a policy looks at, from Transformers' own states."""
    text = trace.instruction
    is_context = torch.ones(text.start, dtype=torch.bool)
    is_context[trace.visual] = False
    context = is_context.nonzero().view(-1)
    scale = trace.q.shape[-1] ** -0.5
    sums = torch.zeros(trace.k.shape[0], trace.k.shape[2], len(trace.audience))
    for total, q, k in zip(sums, trace.q, trace.k, strict=True):
        policy.accumulate(total, q, k, 0, trace.audience, scale)
    return policy.States(
        q_text=trace.q[:, text],
        k_text=trace.k[:, text],
        k_visual=trace.k[:, trace.audience],
        k_context=trace.k[:, context],
        v_visual=trace.v[:, trace.audience],
        q_visual=trace.q[:, trace.visual[-visual_window:]] if visual_window else None,
        accumulated=sums,
        unified=trace.unified,
    )
