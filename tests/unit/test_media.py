# SPDX-License-Identifier: Apache-2.0
"""The hooks on requests with pictures (patches/aircache_patches/media.py)."""

from __future__ import annotations

import asyncio
import errno
import itertools
import re
from array import array
from collections.abc import Awaitable, Callable
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from sglang.srt.managers import mm_schedule
from sglang.srt.managers.mm_utils import pad_mm_token_pairs
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalInputFormat,
    MultimodalInputs,
)
from sglang.srt.multimodal.processors.base_processor import MultimodalSpecialTokens
from sglang.srt.multimodal.processors.executor import MultimodalProcessorExecutor

from aircache_patches import media

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
START, PAD, END, VIDEO = 1, 2, 3, 4
WIDTH = 8
FORMAT = "precomputed_embedding"
GRID = {"image_grid_thw": torch.tensor([[1, 4, 4]])}
EXPANDED = [9, START, *[PAD] * 4, END, 9, 9]


class QwenVLImageProcessor:
    """What of SGLang's own the hooks read."""

    mm_tokens = MultimodalSpecialTokens(
        image_token=PICTURE,
        image_token_id=PAD,
        image_token_regex=re.compile(
            r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|<image>"
        ),
        video_token="<|video_pad|>",
        video_token_id=VIDEO,
        video_token_regex=re.compile(re.escape("<|video_pad|>")),
    )
    _tokenizer = SimpleNamespace(
        convert_ids_to_tokens={PAD: "<|image_pad|>", VIDEO: "<|video_pad|>"}.__getitem__
    )
    hf_config = SimpleNamespace(
        vision_config=SimpleNamespace(
            in_chans=3, temporal_patch_size=2, patch_size=2, spatial_merge_size=2
        )
    )


class TransformersAutoMultimodalProcessor(QwenVLImageProcessor):
    pass


class SomethingNew(QwenVLImageProcessor):
    pass


class MiniCPMMultimodalProcessor(QwenVLImageProcessor):
    """A picture is what stands between START and END."""

    mm_tokens = MultimodalSpecialTokens(image_token="(<image>./</image>)", image_token_id=PAD)
    mm_tokens.parse_regex()


class Glm4vImageProcessor:
    """Frames of a video are filled with the token of pictures."""

    mm_tokens = MultimodalSpecialTokens(
        image_token="<|image|>", image_token_id=PAD, video_token="<|video|>", video_token_id=PAD
    ).build(None)
    _tokenizer = SimpleNamespace(
        convert_ids_to_tokens={PAD: "<|image|>", VIDEO: "<|video|>"}.__getitem__,
        convert_tokens_to_ids={"<|image|>": PAD, "<|video|>": VIDEO}.__getitem__,
    )
    hf_config = QwenVLImageProcessor.hf_config


class PixtralProcessor(Glm4vImageProcessor):
    mm_tokens = MultimodalSpecialTokens(image_token="[IMG]", image_token_id=PAD).build(None)
    _tokenizer = SimpleNamespace(convert_ids_to_tokens={PAD: "[IMG]"}.__getitem__)


def manager_of(processor: Any) -> Any:
    return SimpleNamespace(mm_processor=processor, model_config=SimpleNamespace(hidden_size=WIDTH))


def request_of(text: str | None = None, **fields: Any) -> Any:
    names = ("input_ids", "image_data", "video_data", "audio_data", "modalities")
    defaults: dict[str, Any] = dict.fromkeys(names)
    return SimpleNamespace(text=text, contains_mm_input=lambda: True, **defaults | fields)


def item_of(
    start: int, end: int, feature: Any = None, *, precomputed: bool = False
) -> MultimodalDataItem:
    item = MultimodalDataItem(modality=Modality.IMAGE, offsets=[(start, end)], feature=feature)
    if precomputed:
        item.format = MultimodalInputFormat.PRECOMPUTED_EMBEDDING
    item.set_hash(100 + start)
    return item


def tokenize(
    request: Any,
    outcome: list[MultimodalDataItem] | Exception | Callable[[], Awaitable[Any]],
    processor: Any = None,
    length: int = 10,
    ids: list[int] | None = None,
) -> Any:
    """The hook around a tokenizer manager that finds these items, or raises; what it was asked."""
    asked = []

    async def original(manager: Any, obj: Any) -> Any:
        asked.append(obj)
        if isinstance(outcome, Exception):
            raise outcome
        if callable(outcome):
            return await outcome()
        expanded = ids or [9] * length
        for item in () if ids else outcome:
            for start, end in item.offsets or ():
                for position in range(start, min(end + 1, length)):
                    expanded[position] = PAD
        return SimpleNamespace(input_ids=expanded, mm_inputs=SimpleNamespace(mm_items=outcome))

    manager = manager_of(processor or QwenVLImageProcessor())
    asyncio.run(media.tokenize_one_request(original, manager, request))
    return asked[0]


def test_a_good_request_is_asked_as_it_is() -> None:
    request = request_of(f"a{PICTURE}b", image_data=["x.png"])
    assert tokenize(request, [item_of(2, 5)]).text == request.text


def test_a_request_without_media_is_not_looked_at() -> None:
    request = request_of("what is <|image_pad|>?")
    request.contains_mm_input = lambda: False
    assert tokenize(request, []) is request


@pytest.mark.parametrize("field", ["text", "input_ids"])
def test_the_fallback_counts_marks_of_all_requests(field: str) -> None:
    """So a text without media must say none: it would take another's picture."""
    processor = TransformersAutoMultimodalProcessor()
    for said, good in (([9, 8], True), ([9, PAD], False)):
        prompt = said if field == "input_ids" else "a house" if good else "what is <|image_pad|>?"
        request = request_of(**{field: prompt})
        request.contains_mm_input = lambda: False
        if good:
            assert getattr(tokenize(request, [], processor), field) == prompt
        else:
            with pytest.raises(ValueError, match="1 picture and the request brings 0"):
                tokenize(request, [], processor)


@pytest.mark.parametrize(
    "request_",
    [
        request_of(f"{PICTURE} and <|image_pad|>", image_data=["x.png"]),
        request_of(f"{PICTURE} and <|video_pad|>", image_data=["x.png"]),
        request_of(PICTURE, image_data=["x.png", "y.png"]),
        request_of(PICTURE, image_data="x.png", video_data=["x.mp4"]),
        request_of(input_ids=[9, PAD, 9, PAD], image_data=["x.png"]),
    ],
)
def test_what_does_not_fit_is_never_loaded(request_: Any) -> None:
    with pytest.raises(ValueError, match="the prompt speaks of"):
        tokenize(request_, AssertionError("it was loaded"))


def test_expanded_ids_are_taken_back_and_checked() -> None:
    ids = [9, START, PAD, PAD, PAD, END, 9, 9]
    request = request_of(input_ids=ids, image_data=["x.png"])
    assert tokenize(request, [item_of(2, 4)]).input_ids == [9, START, PAD, END, 9, 9]
    assert request.input_ids == ids, "the caller's own request was changed"
    with pytest.raises(ValueError, match="3 times for picture 1, which fills 4"):
        tokenize(request, [item_of(2, 5)])


def test_a_picture_without_a_place() -> None:
    request = request_of(PICTURE, image_data=["x.png"])
    for items in ([], [MultimodalDataItem(modality=Modality.IMAGE, offsets=[])]):
        with pytest.raises(ValueError, match="no place"):
            tokenize(request, items)
    # Of a prompt that SGLang has cut, and refuses itself.
    cut = [MultimodalDataItem(modality=Modality.IMAGE, offsets=[(8, 12)])]
    assert tokenize(request, cut).text == request.text


def test_models_that_read_no_ids_and_no_embeddings() -> None:
    processor = TransformersAutoMultimodalProcessor()
    with pytest.raises(ValueError, match="send text in place of input_ids"):
        tokenize(request_of(input_ids=[PAD], image_data=["x.png"]), [], processor)
    data = {"format": FORMAT, "feature": torch.zeros(4, WIDTH)}
    with pytest.raises(ValueError, match="no precomputed embedding or processor output"):
        tokenize(request_of(PICTURE, image_data=[data]), [], processor)
    # A word for videos would take another request's.
    request = request_of(f"{PICTURE} and <|video_pad|>", image_data=["x.png"])
    with pytest.raises(ValueError, match="1 video and the request brings 0"):
        tokenize(request, [item_of(2, 5)], processor)


def test_what_stands_between_two_tokens_that_a_text_says_too() -> None:
    processor, mark = MiniCPMMultimodalProcessor(), "(<image>./</image>)"
    request = request_of(mark, image_data=["x.png"])
    assert tokenize(request, [item_of(2, 5)], processor).text == mark
    # A start before the picture, an end before it: pairs as SGLang would make them.
    for start, end in ((1, 5), (2, 1)):
        outside = MultimodalDataItem(modality=Modality.IMAGE, offsets=[(start, end)])
        with pytest.raises(ValueError, match="tokens that stand around each picture; write"):
            tokenize(request, [outside], processor, ids=[9, 9, *[PAD] * 4, 9, 9])
    with pytest.raises(ValueError, match="speaks of 2 pictures"):
        tokenize(request_of(f"{mark} <|image_pad|>", image_data=["x"]), [], processor)


def test_sounds() -> None:
    class QwenVLImageProcessor:  # of Qwen3-Omni
        mm_tokens = MultimodalSpecialTokens(audio_token="<|audio_pad|>", audio_token_id=VIDEO)
        mm_tokens.parse_regex()
        _tokenizer = SimpleNamespace(convert_ids_to_tokens={VIDEO: "<|audio_pad|>"}.__getitem__)
        hf_config = SimpleNamespace()

    sound = MultimodalDataItem(modality=Modality.AUDIO, offsets=[(2, 3)])
    request = request_of("<|audio_pad|>", audio_data=["x.wav"])
    assert tokenize(request, [sound], QwenVLImageProcessor()).text == request.text
    with pytest.raises(ValueError, match="speaks of 2 sounds and the request brings 1"):
        tokenize(request_of("<|audio_pad|>" * 2, audio_data=["x.wav"]), [], QwenVLImageProcessor())
    data = {"format": FORMAT, "feature": torch.zeros(4, WIDTH)}
    with pytest.raises(ValueError, match="reads each sound from a file"):
        tokenize(request_of("<|audio_pad|>", audio_data=[data]), [], QwenVLImageProcessor())
    # A model that knows no sounds would answer without it.
    request = request_of(PICTURE, image_data=["x.png"], audio_data=["x.wav"])
    with pytest.raises(ValueError, match="no place for the request's sound"):
        tokenize(request, [item_of(2, 5)])


def frames_of(*spans: tuple[int, int], height: int = 4) -> MultimodalDataItem:
    """A video of a frame a span, each of height x 4 patches, four of which are one token."""
    item = MultimodalDataItem(modality=Modality.VIDEO, offsets=list(spans))
    item.set("video_grid_thw", torch.tensor([[len(spans), height, 4]]))
    return item


@pytest.mark.parametrize("field", ["text", "input_ids"])
def test_a_video_whose_frames_are_filled_as_pictures(field: str) -> None:
    processor = Glm4vImageProcessor()
    words = {"text": "a <|image|> and <|video|>", "input_ids": [9, PAD, 9, VIDEO]}[field]
    request = request_of(**{field: words}, image_data=["x.png"], video_data=["x.mp4"])
    picture = item_of(0, 3)
    picture.set(*next(iter(GRID.items())))
    items = [picture, frames_of((4, 7), (9, 12))]
    assert getattr(tokenize(request, items, processor, 14), field) == words
    # A text that says where a video ends hides what follows.
    with pytest.raises(ValueError, match="fills 8 tokens, and the prompt keeps 6 for it"):
        tokenize(request, [picture, frames_of((4, 6), (9, 11))], processor, 14)
    for image_data, video_data in ((["x.png"] * 2, ["x.mp4"]), (["x.png"], ["x.mp4"] * 2)):
        request = request_of(**{field: words}, image_data=image_data, video_data=video_data)
        with pytest.raises(ValueError, match=r"speaks of 1 (picture|video) and .* brings 2"):
            tokenize(request, AssertionError("loaded"), processor)


def test_a_processor_around_another() -> None:
    """As that of LlavaForConditionalGeneration, which has no words of its own."""
    inner = PixtralProcessor()
    processor = media.get_mm_processor(
        lambda config, worker: SimpleNamespace(inner=config), inner, worker=1
    )
    assert processor is inner
    assert media.get_mm_processor(lambda: inner) is inner
    request = request_of("[IMG] and [IMG]", image_data=["x.png"])
    with pytest.raises(ValueError, match=r"speaks of 2 pictures .*; write \[IMG\] once for each"):
        tokenize(request, AssertionError("loaded"), processor)
    request = request_of(input_ids=[9, PAD, 9], image_data=["x.png"])
    rows = MultimodalDataItem(modality=Modality.IMAGE, offsets=[(1, 2), (4, 5)])
    assert tokenize(request, [rows], processor).input_ids == [9, PAD, 9]
    with pytest.raises(ValueError, match="no place for the request's video"):
        request = request_of("[IMG]", image_data=["x.png"], video_data=["x.mp4"])
        tokenize(request, [rows], processor)


def test_an_unknown_processor_is_left_alone() -> None:
    request = request_of(f"{PICTURE}{PICTURE}", image_data=["x.png"])
    assert tokenize(request, [], SomethingNew()) is request


def test_prepared_data() -> None:
    embedding = torch.zeros(4, WIDTH)
    items = [item_of(2, 5, embedding, precomputed=True)]
    data = {"format": FORMAT, "feature": embedding, **GRID}
    tokenize(request_of(input_ids=EXPANDED, image_data=[data]), items)
    tokenize(request_of("<|image_pad|>" * 4, image_data=[data]), items)
    tokenize(request_of(input_ids=[9] * 10, image_data=[data | {"offsets": [(2, 5)]}]), items)
    # With positions of its own the grid is not read.
    data = {"format": FORMAT, "feature": embedding, "mrope_positions": torch.zeros(3, 10)}
    tokenize(request_of(input_ids=EXPANDED, image_data=[data]), items)
    patches = torch.zeros(16, 24)
    data = {"format": "processor_output", "pixel_values": patches, **GRID}
    tokenize(request_of(input_ids=EXPANDED, image_data=[data]), [item_of(2, 5, patches)])


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({"format": FORMAT}, "must be a floating-point tensor, got NoneType"),
        ({"format": FORMAT, "feature": [[0.0] * WIDTH] * 4}, "floating-point tensor, got list"),
        ({"format": FORMAT, "feature": torch.zeros(3, WIDTH)}, "has 3 rows, and .* keeps 4"),
        (
            {"format": FORMAT, "feature": torch.zeros(4, WIDTH), "offsets": [(2, 11)]},
            "of a prompt that has 9",
        ),
        ({"format": FORMAT, "feature": torch.zeros(4, WIDTH)}, "a grid of shape"),
        ({"format": FORMAT, "feature": torch.zeros(4, WIDTH + 1)}, r"reads \[tokens, 8\]"),
        ({"format": "jpeg", "feature": 1}, "must be precomputed_embedding or processor_output"),
        ({"feature": torch.zeros(4, WIDTH)}, "or processor_output, got None"),
        (
            {"format": "processor_output", "precomputed_embeddings": torch.zeros(4, WIDTH)},
            "given with the format precomputed_embedding",
        ),
        ({"format": "processor_output", "pixel_values": torch.zeros(16, 24)}, "a grid of shape"),
    ],
)
def test_prepared_data_that_does_not_fit(data: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tokenize(request_of(input_ids=EXPANDED, image_data=[data]), AssertionError("loaded"))


def in_turn(*errors: Exception) -> Exception:
    """The last, raised because of the one before, as SGLang raises anew."""
    for cause, error in itertools.pairwise(errors):
        error.__cause__ = cause
    return errors[-1]


@pytest.mark.parametrize(
    "error",
    [
        IndexError("list index out of range"),
        in_turn(StopIteration(), RuntimeError("coroutine raised StopIteration")),
        FileNotFoundError(errno.ENOENT, "No such file"),
        OSError("image file is truncated"),
        in_turn(
            Image.DecompressionBombError("exceeds limit"),
            RuntimeError("Error while loading data"),
            RuntimeError("An exception occurred while loading IMAGE data"),
        ),
    ],
)
def test_what_a_request_makes_the_processors_raise(error: Exception) -> None:
    request = request_of(PICTURE, image_data=["x.png"])
    with pytest.raises(ValueError, match="the request's pictures cannot be used") as raised:
        tokenize(request, error)
    origin = error
    while origin.__cause__ is not None:
        origin = origin.__cause__
    assert type(origin).__name__ in str(raised.value) and "\n" not in str(raised.value)


def test_sglangs_own_sentences_are_cut_short() -> None:
    request = request_of(PICTURE, image_data=["x.png"])
    own = ValueError("Could not decode image")
    with pytest.raises(ValueError) as raised:
        tokenize(request, own)
    assert raised.value is own
    with pytest.raises(ValueError, match=r"^Invalid image: 0 1 [0-9 ]*\.\.\.$") as raised:
        tokenize(request, ValueError(f"Invalid image:\n{' '.join(map(str, range(999)))}"))
    assert len(str(raised.value)) == 303


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("out of memory"),
        MemoryError(),
        TimeoutError(),
        ImportError("no ffmpeg"),
        BrokenProcessPool("a worker died"),
        OSError(errno.EMFILE, "Too many open files"),
        in_turn(OSError(errno.ENOSPC, "No space left"), RuntimeError("Error while loading data")),
    ],
)
def test_what_is_the_servers_own_fault_stays_so(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        tokenize(request_of(PICTURE, image_data=["x.png"]), error)
    assert raised.value is error


def exhausted(processor: Any) -> Any:
    return next(iter(()))


def test_a_stop_iteration_reaches_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> Any:
        executor = MultimodalProcessorExecutor(object, max_workers=1)
        # Stock prints the reason on the loop, and leaves the future as it is.
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        try:
            return await asyncio.wait_for(executor.run(exhausted), 1)
        finally:
            executor.shutdown()

    with pytest.raises(TimeoutError):
        asyncio.run(run())
    original = MultimodalProcessorExecutor._run
    monkeypatch.setattr(
        MultimodalProcessorExecutor,
        "_run",
        lambda executor, *args: media.run_in_worker(original, executor, *args),
    )
    with pytest.raises(ValueError, match="more media than the request brings"):
        asyncio.run(run())


def test_an_embedding_beside_pixels_of_another_request() -> None:
    """SGLang's own scheduling of encoders, on two requests in one batch."""
    mm_schedule.init_mm_embedding_cache(1 << 20)
    embedding = torch.full((3, WIDTH), 7.0)
    items = [item_of(1, 2, torch.zeros(8, 24)), item_of(2, 4, embedding, precomputed=True)]
    seen = []

    def encode(some: list[MultimodalDataItem]) -> torch.Tensor:
        seen.extend(some)
        return torch.ones(sum(len(item.feature) // 4 for item in some), WIDTH)

    ids = torch.tensor(
        [9, *items[0].padding_sequence(2), 9, 9, 9, *items[1].padding_sequence(3), 9]
    )
    rows, mask, _ = media.get_embedding_and_mask(
        mm_schedule.get_embedding_and_mask,
        encode,
        items,
        torch.tensor(sorted(value for item in items for value in item.padding_values())),
        ids,
        items_size=[0, 1, 2],
        prefix_length=[0, 0],
        extend_length=[4, 6],
        items_offset_list=[[(1, 2)], [(2, 4)]],
    )
    assert seen == [items[0]], "the encoder was given an embedding"
    assert torch.equal(rows, torch.cat([torch.ones(2, WIDTH), embedding]))
    assert mask.flatten().tolist() == [False, True, True, *[False] * 3, *[True] * 3, False]


class LightOnOCRForConditionalGeneration:
    """SGLang's own begins so: pictures are stacked (models/lightonocr.py, get_image_feature)."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def get_image_feature(self, items: list[MultimodalDataItem]) -> torch.Tensor:
        pixels = torch.cat([item.feature for item in items])
        self.calls.append(len(pixels))
        return pixels.flatten(1).sum(1, keepdim=True)


def test_sounds_are_not_stacked_either() -> None:
    assert "Qwen3OmniMoeThinkerForConditionalGeneration" in media._STACKING
    from sglang.srt.models import qwen3_omni_moe

    assert hasattr(qwen3_omni_moe.Qwen3OmniMoeThinkerForConditionalGeneration, "get_audio_feature")


@pytest.mark.parametrize("sizes", [(28, 28, 28), (28, 56, 28)])
def test_pictures_of_several_sizes_are_not_stacked(sizes: tuple[int, ...]) -> None:
    model = LightOnOCRForConditionalGeneration()
    items = [item_of(i, i, torch.full((1, 3, 28, sizes[i]), i + 1.0)) for i in range(3)]
    rows = media.get_embedding_and_mask(
        lambda encode, items: encode(items), model.get_image_feature, items
    )
    assert rows.flatten().tolist() == [3 * 28 * sizes[i] * (i + 1.0) for i in range(3)]
    assert model.calls == ([3] if len(set(sizes)) == 1 else [1, 1, 1])


def test_without_embeddings_the_encoder_is_sglangs() -> None:
    calls = []
    encode = object()
    media.get_embedding_and_mask(
        lambda *args, **kwargs: calls.append((args, kwargs)), encode, [item_of(0, 1)], 3, key=4
    )
    [((function, _, three), kwargs)] = calls
    assert function is encode and three == 3 and kwargs == {"key": 4}


@pytest.mark.parametrize(
    "tail", [[START, 9], [END], [START, 9, END]], ids=["start", "end", "a pair"]
)
def test_items_are_padded_where_they_are(tail: list[int]) -> None:
    """Not between tokens that the text may say."""
    item = item_of(2, 4)
    ids = array("q", [9, START, PAD, PAD, PAD, END, 9, *tail])
    inputs = MultimodalInputs(mm_items=[item], im_token_id=PAD)
    pairs = {"data_token_pairs": [(START, END)]}
    padded = media.pad_mm_token_pairs(pad_mm_token_pairs, ids, inputs, **pairs)
    assert padded[2:5].tolist() == item.padding_sequence(3)
    assert padded[:2] + padded[5:] == ids[:2] + ids[5:]
    assert pad_mm_token_pairs(ids, inputs, **pairs) != padded, "SGLang itself does it now"


def test_items_that_do_not_know_their_place_are_padded_by_sglang() -> None:
    item = MultimodalDataItem(modality=Modality.IMAGE)
    item.set_hash(5)
    ids = array("q", [9, START, PAD, END])
    inputs = MultimodalInputs(mm_items=[item], im_token_id=PAD)
    pairs = {"data_token_pairs": [(START, END)]}
    padded = media.pad_mm_token_pairs(pad_mm_token_pairs, ids, inputs, **pairs)
    assert padded.tolist() == [9, START, *item.padding_sequence(1), END]
