# SPDX-License-Identifier: Apache-2.0
"""Chats about pictures with a compressing server, and what Transformers says to each turn."""

from __future__ import annotations

from typing import Any

from PIL import Image

from aircache_sglang.testing.oracle import LOGPROB_TOLERANCE, Oracle
from aircache_sglang.testing.prompts import PICTURE, Prompt, ask, words
from aircache_sglang.testing.server import Server

NEW_TOKENS = 6
RETENTION = 0.3


def next_turn(prompt: Prompt, answer: Any, seed: int, *images: Image.Image) -> Prompt:
    """The prompt that continues a chat, with further pictures."""
    text = answer["text"] + "<|im_end|>\n<|im_start|>user\n" + PICTURE * len(images)
    text += words(3 + seed % 4, seed=seed) + "<|im_end|>\n<|im_start|>assistant\n"
    return Prompt(prompt.text + text, (*prompt.images, *images))


def question(server: Server, prompt: Prompt, **overrides: Any) -> Any:
    """A greedy answer of NEW_TOKENS tokens; overrides are AirCache's."""
    overrides = {"retention": RETENTION, **overrides}
    return ask(server, prompt, overrides, max_new_tokens=NEW_TOKENS)


def cached(answer: Any) -> int:
    """Tokens of the prompt that were not computed."""
    return int(answer["meta_info"]["cached_tokens"])


def carried(
    oracle: Oracle,
    first: Prompt,
    prompt: Prompt,
    answer: Any,
    selection: Any,
    *,
    exact: int | None = None,
) -> float:
    """The largest difference from Transformers, which carries the masked cache across turns.

    exact: tokens of the first prompt that were computed beside the whole picture; None for all.
    """
    inputs, whole = oracle.inputs(first), oracle.inputs(prompt)
    head, ids = inputs["input_ids"][0].tolist(), whole["input_ids"][0].tolist()
    assert ids[: len(head)] == head and answer["meta_info"]["prompt_tokens"] == len(ids)
    # All that follows has seen only what was kept of the picture.
    packed_at = 1 if exact is None else exact - len(head) + 1
    tokens = ids[len(head) :] + answer["output_ids"]
    packs = [] if selection is None else [(packed_at, selection)]
    trace = oracle.run(inputs, tokens, packs=packs)
    steps = answer["meta_info"]["output_token_logprobs"]
    top = answer["meta_info"]["output_top_logprobs"]
    rows = trace.logprobs[-len(steps) :]
    return max(
        abs(value - float(row[token]))
        for row, step, others in zip(rows, steps, top, strict=True)
        for value, token, _ in (step, *others)
    )


def compressed_chat(
    server: Server,
    oracle: Oracle,
    prompt: Prompt,
    turns: int,
    long_turn: int = -1,
    *,
    page: int = 1,
    speculates: bool = False,
) -> None:
    """Check every turn of a chat with compressed sharing; after `long_turn` much text follows.

    page: of the server. What of the first prompt is behind its last whole page goes to the tree
    with the first answer that fills the page, or is computed again by the next turn.
    speculates: a turn's last token may have been fed back, as a draft that was right.
    """
    first, selection, length, exact = prompt, None, 0, None
    overrides = {"reuse": "compressed", "return_selection": True}
    for turn in range(turns):
        answer = question(server, prompt, **overrides)
        report = answer["meta_info"]["aircache"]
        if turn == 0:
            selection = report["selection"]
        assert report["selection"] == selection and report["reused"] == (turn > 0)
        error = carried(oracle, first, prompt, answer, selection, exact=exact)
        assert error < LOGPROB_TOLERANCE, f"turn {turn}: {error:.2e}"
        if turn:
            # All of the last turn but its last token, which was never fed back.
            least = (length - 1) // page * page
            assert 0 <= cached(answer) - least <= speculates
        n_prompt = answer["meta_info"]["prompt_tokens"]
        length = n_prompt + NEW_TOKENS
        if turn == 0:
            in_pages = (length - 1) // page * page
            exact = n_prompt if in_pages > n_prompt else n_prompt // page * page
        prompt = next_turn(prompt, answer, turn)
        if turn == long_turn:
            prompt = Prompt(prompt.text + words(300, seed=3), prompt.images)
