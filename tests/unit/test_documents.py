# SPDX-License-Identifier: Apache-2.0
"""The rendered pages, their questions, and the batches that the model is trained on."""

from __future__ import annotations

import json
import signal
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from benchmarks.documents import model as documents_model
from benchmarks.documents import train
from benchmarks.documents.model import SHAPE
from benchmarks.documents.pages import CELL, CHARACTERS, render
from benchmarks.documents.questions import (
    EVALUATED,
    KINDS,
    LARGE,
    TEMPLATES,
    Layout,
    document,
    evaluation_set,
)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_fixed_and_answerable(kind: str) -> None:
    first, again = evaluation_set(kind, 5), evaluation_set(kind, 5)
    assert [(q.prompt, q.answer, q.id) for q in first] == [
        (q.prompt, q.answer, q.id) for q in again
    ]
    assert len({q.id for q in first}) == 5
    for question, other in zip(first, again, strict=True):
        pages = question.images()
        assert sum(p.width * p.height for p in pages) // CELL**2 == EVALUATED[kind].visual_tokens
        assert all(
            np.array_equal(np.asarray(a), np.asarray(b))
            for a, b in zip(pages, other.images(), strict=True)
        )
        assert 5 <= len(question.answer) <= 16
        # Only the page can tell.
        assert question.answer not in question.prompt
        assert any(question.answer in line for sheet in question.sheets for line in sheet.text)


@pytest.mark.parametrize("layout", [*EVALUATED.values(), *LARGE.values(), *train.LADDER["cell"]])
def test_no_answer_is_both_trained_and_evaluated(layout: Layout) -> None:
    generator = np.random.default_rng(0)
    for held_out in (False, True):
        made = document(layout, generator, held_out=held_out)
        assert all(
            (zlib.crc32(a.encode()) % 8 == 0) is held_out for a in (ask.answer for ask in made.asks)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_question_has_one_answer(kind: str) -> None:
    made = document(EVALUATED[kind], np.random.default_rng(1), held_out=False)
    asked = [tuple(sorted(slots.items())) for slots in (ask.slots for ask in made.asks)]
    assert len(set(asked)) == len(asked)
    assert all("{" not in t.format(**made.asks[0].slots) for t in TEMPLATES[kind])


def test_bad_layouts_and_kinds_are_named() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of .* got 'poem'"):
        Layout("poem", 16, 16)
    with pytest.raises(ValueError, match="at least 3 rows, 16 columns and 1 page, got 2, 16 and 1"):
        Layout("value", 2, 16)
    with pytest.raises(ValueError, match="got 'poem'"):
        evaluation_set("poem", 1)
    with pytest.raises(ValueError, match="not be negative, got -1"):
        evaluation_set("value", -1)


def test_print_can_be_read() -> None:
    """Ink and paper differ in every rendering, and every character looks different."""
    made = document(EVALUATED["value"], np.random.default_rng(2), held_out=False)
    for seed in range(8):
        pixels = render(made.sheets[0], np.random.default_rng(seed)).astype(float).mean(-1)
        low, high = np.percentile(pixels, (2, 99.5))
        assert high - low > 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents") / "model"
    documents_model.write_untrained(folder)
    return folder


def heads_with_gradients(model: Any, parameter: str) -> set[tuple[int, int]]:
    """(layer, head) that a backward pass reaches in a projection of the attention."""
    found = set()
    for index, layer in enumerate(model.model.language_model.layers):
        grad = layer.self_attn.get_parameter(parameter).grad
        grads = (grad.T if parameter == "o_proj.weight" else grad).split(SHAPE["head_dim"])
        found |= {(index, head) for head, each in enumerate(grads) if each.any()}
    return found


@pytest.mark.parametrize("released", [False, True])
def test_no_gradient_reaches_a_kernel_that_is_held(checkpoint: Path, released: bool) -> None:
    model, tokenizer = documents_model.load(checkpoint)
    documents_model.initialise(model, 0)
    hold = documents_model.Hold(model)
    if released:
        hold.release()
    generator = np.random.default_rng(0)
    made = [document(Layout("line", 4, 16), generator, held_out=False)]
    batch = documents_model.make_batch(made, 4, "line", tokenizer, generator)
    logits, targets, _ = documents_model.answer_logits(model, batch, tokenizer, dtype=torch.float32)
    torch.nn.functional.cross_entropy(logits, targets).backward()
    everything = {(layer, head) for layer in range(SHAPE["layers"]) for head in range(4)}
    kernels = {at for at in documents_model.KERNELS if at[0] == 0 or not released}
    for parameter in ("q_proj.weight", "q_proj.bias", "o_proj.weight"):
        assert heads_with_gradients(model, parameter) == everything - kernels
    # Of the second layer, both heads of the first group are kernels.
    groups = {at for at in everything if at[1] < SHAPE["kv_heads"]}
    held = {(0, 0), (0, 1)} if released else {(0, 0), (0, 1), (1, 0)}
    for parameter in ("k_proj.weight", "v_proj.weight", "v_proj.bias"):
        assert heads_with_gradients(model, parameter) == groups - held


def test_packed_questions_equal_transformers(checkpoint: Path) -> None:
    """Questions side by side on shared pages give the logits of each alone, by Transformers."""
    model, tokenizer = documents_model.load(checkpoint)
    documents_model.initialise(model, 0)
    model.eval()
    stock = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    stock.load_state_dict(model.state_dict())
    stock.eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    generator = np.random.default_rng(0)
    made = [document(Layout("page", 5, 16, 2), generator, held_out=False) for _ in range(2)]
    batch = documents_model.make_batch(made, 3, "page", tokenizer, generator)
    with torch.no_grad():
        logits, targets, _ = documents_model.answer_logits(
            model, batch, tokenizer, dtype=torch.float32
        )
    content = [{"type": "image"}] * 2 + [{"type": "text", "text": "?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    prefix = prompt[: prompt.index("?")]
    done = 0
    for pages, texts, wanted in zip(batch.pages, batch.text, batch.targets, strict=True):
        images = [Image.fromarray(page) for page in pages]
        for text, target in zip(texts, wanted, strict=True):
            places = (target != documents_model.IGNORED).nonzero().flatten()
            inputs = processor(text=[prefix], images=images, return_tensors="pt")
            asked = text[None, : int(places[-1]) + 1]
            # The prompt ends as the chat template says.
            until = int(places[0]) + 1
            assert prompt.endswith(tokenizer.decode(text[until - 5 : until]))
            with torch.no_grad():
                alone = stock(
                    input_ids=torch.cat([inputs["input_ids"], asked], 1),
                    mm_token_type_ids=torch.cat(
                        [inputs["mm_token_type_ids"], torch.zeros_like(asked)], 1
                    ),
                    pixel_values=inputs["pixel_values"],
                    image_grid_thw=inputs["image_grid_thw"],
                ).logits[0, -len(places) :]
            assert torch.equal(targets[done : done + len(places)], target[places])
            error = (alone - logits[done : done + len(places)]).abs().max().item()
            assert error < 1e-4, error
            done += len(places)
    assert done == len(logits)


def test_every_character_and_word_is_one_token(checkpoint: Path) -> None:
    _, tokenizer = documents_model.load(checkpoint)
    assert len(set(documents_model.character_ids(tokenizer).tolist())) == len(CHARACTERS)
    assert tokenizer.tokenize("what is the value of A7Q?") == [
        *("what", "Ġis", "Ġthe", "Ġvalue", "Ġof", "Ġ", "A", "7", "Q", "?")
    ]


def interrupted(*arguments: Any) -> Any:
    signal.raise_signal(signal.SIGTERM)
    return documents_model.make_batch(*arguments)


@pytest.fixture
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training of seconds."""
    monkeypatch.setattr(train, "READING_STEPS", 1)
    monkeypatch.setattr(train, "TOKENS", 300)
    monkeypatch.setattr(train, "QUESTIONS", 4)


@pytest.mark.usefixtures("short_steps")
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after 2 of 4 steps and started again: the same weights as in one go."""
    outputs = []
    for name in ("whole", "parts"):
        work, output = tmp_path / name, tmp_path / f"{name}-out"
        arguments = ["--work", str(work), "--steps", "4", "--threads", "1", "--output", str(output)]
        if name == "parts":
            batches = iter((train.make_batch, interrupted))
            with monkeypatch.context() as patched:
                patched.setattr(train, "make_batch", lambda *args, b=batches: next(b)(*args))
                assert train.main(arguments) == 130
            assert not output.exists()
        assert train.main(arguments) == 0
        outputs.append((output / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]


def last_row_of_two_steps(folder: Path, *arguments: str) -> dict[str, Any]:
    """Of the log of a training on lines alone."""
    common = ["--work", str(folder / "work"), "--output", str(folder / "out"), "--steps", "2"]
    common += ["--threads", "1", "--dtype", "float32", "--kinds", "line"]
    assert train.main([*common, *arguments]) == 0
    row: dict[str, Any] = json.loads((folder / "work" / "log.jsonl").read_text().splitlines()[-1])
    return row


@pytest.mark.usefixtures("short_steps")
def test_a_plain_training_has_no_guide_and_its_kinds_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents_model, "Guide", None)  # not to be called
    last = last_row_of_two_steps(tmp_path, "--plain")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert last["step"] == 2
    assert "grounding" not in last
    assert list(last["loss"]) == list(last["exact"]) == list(last["level"]) == ["line"]


@pytest.mark.usefixtures("short_steps")
@pytest.mark.parametrize(("advance", "guided"), [(0.0, True), (2.0, False)])
def test_where_to_look_is_taught_once_the_pages_have_grown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, advance: float, guided: bool
) -> None:
    monkeypatch.setattr(train, "ADVANCE", advance)
    monkeypatch.setattr(train, "WATCHED", 1)
    last = last_row_of_two_steps(tmp_path)
    assert ("grounding" in last) is guided
    assert (last["level"]["line"] > 0) is guided


@pytest.mark.usefixtures("short_steps")
def test_the_guide_begins_at_the_layer_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guided: set[tuple[int, bool]] = set()

    class Watched(documents_model.Guide):
        def __call__(self, logits: torch.Tensor, layer: int) -> torch.Tensor:
            before = len(self._losses)
            seen = super().__call__(logits, layer)
            guided.add((layer, len(self._losses) > before))
            return seen

    monkeypatch.setattr(documents_model, "Guide", Watched)
    monkeypatch.setattr(train, "ADVANCE", 0.0)
    monkeypatch.setattr(train, "WATCHED", 1)
    last_row_of_two_steps(tmp_path, "--guide-from", "2")
    assert guided == {(layer, layer >= 2) for layer in range(6)}


def test_no_guide_goes_with_no_layer_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.main(["--work", str(tmp_path), "--plain", "--guide-from", "2"])
    assert "--guide-from: not allowed with argument --plain" in capsys.readouterr().err


def test_a_warm_start_from_nowhere_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.main(["--work", str(tmp_path), "--warm-start", str(tmp_path / "none")])
    assert "none holds no model" in capsys.readouterr().err


def guided(drop: int | None) -> tuple[torch.Tensor, documents_model.Guide]:
    """Of a batch of 2 pages x 3 questions: which of its prefix is visual, and its guide."""
    batch = documents_model.Batch(
        pages=np.zeros((2, 1, 3 * CELL, 16 * CELL, 3), dtype=np.uint8),
        text=torch.zeros(2, 3, 9, dtype=torch.long),
        targets=torch.full((2, 3, 9), documents_model.IGNORED),
        evidence=torch.zeros(2, 3, 48, dtype=torch.bool),
    )
    batch.targets[:, :, 6:] = 1
    batch.evidence[:, :, 20:23] = True
    visual = torch.tensor([False] * 3 + [True] * 48 + [False])
    return visual, documents_model.Guide(batch, visual, drop)


@pytest.mark.parametrize("layer", [0, documents_model.GUIDED_FROM])
def test_only_answers_miss_cells_and_never_their_evidence(layer: int) -> None:
    hidden = torch.zeros(52)
    for seed in range(20):
        visual, guide = guided(seed)
        seen = guide(torch.zeros(2, 2, 3, 2, 9, 52), layer)
        gone = seen.isinf()
        # Row 6 is the prompt's last token: it draws the answer's first.
        assert not gone[:, :, :, :, :7].any()
        assert not gone[..., ~visual].any()
        if layer >= documents_model.GUIDED_FROM:
            assert not gone[..., 3 + 20 : 3 + 23].any()
        hidden += gone[:, :, :, :, 7:].float().mean((0, 1, 2, 3, 4))
    others = [i for i in range(3, 51) if not 23 <= i < 26]
    assert 0.3 < hidden[others].mean() / 20 < 0.7
    assert (hidden[23:26].mean() / 20 > 0.3) == (layer < documents_model.GUIDED_FROM)
    _, guide = guided(None)
    assert not guide(torch.zeros(2, 2, 3, 2, 9, 52), layer).isinf().any()


def test_the_loss_is_least_where_attention_is_on_the_evidence() -> None:
    losses = []
    for strength in (0.0, 4.0):
        _, guide = guided(None)
        logits = torch.zeros(2, 2, 3, 2, 9, 52)
        logits[..., 3 + 20 : 3 + 23] = strength
        guide(logits, documents_model.GUIDED_FROM)
        losses.append(guide.loss().item())
    assert losses[0] == pytest.approx(np.log(48), abs=1e-5)
    assert np.log(3) < losses[1] < np.log(3) + 0.3
