# SPDX-License-Identifier: Apache-2.0
"""Requests with pictures that SGLang 0.5.23 does not survive: refused in a sentence, or served.

docs/bad-requests.md lists them, patches/upstream mends them in SGLang itself.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import functools
import logging
import re
import struct
import sys
import zlib
from array import array
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import torch
from PIL import Image
from sglang.srt.managers.schedule_batch import Modality, MultimodalInputFormat
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor

from aircache_patches.prompt_media import (
    Mark,
    check_embedding,
    check_enclosed,
    check_grid,
    check_patches,
    check_runs,
    check_spans,
    check_tensor,
    check_tiles,
    fit,
)

KINDS = {"picture": Modality.IMAGE, "video": Modality.VIDEO, "sound": Modality.AUDIO}

logger = logging.getLogger(__name__)

# What a picture that cannot be decoded, or data of another shape, makes the processors raise.
_OF_THE_REQUEST = (
    *(AssertionError, AttributeError, EOFError, LookupError, StopIteration, SyntaxError, TypeError),
    *(ValueError, struct.error, zlib.error, Image.DecompressionBombError),
)
# Of the operating system's errors, those that a bad path makes; Pillow's own have no number.
_OF_A_PATH = {
    None,
    *(errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP),
}
# Models that stack the pictures, or sounds, of all requests of a batch, whatever their sizes
# (models/lightonocr.py, get_image_feature; models/qwen3_omni_moe.py, get_audio_feature).
_STACKING = (
    "LightOnOCRForConditionalGeneration",
    "Qwen3OmniMoeThinkerForConditionalGeneration",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Reader:
    """What one of SGLang's processors does with a prompt that has pictures.

    ids: it takes the prompt as token ids. prepared: it takes embeddings and processor outputs in
    place of pictures. adds: it writes the marks that a prompt lacks. strict: a mark of a kind of
    which the request brings nothing is an error; else it is text. encloses: what stands between two
    tokens is a picture to it, and a text may say these tokens too. one_token: frames of a video are
    filled with the token of pictures, and only tokens that a text may say too tell them apart.
    counts: it looks for marks in all requests of a batch, so that one that a request brings nothing
    for takes another's picture; an error in a text alone, too.
    """

    ids: bool = False
    prepared: bool = False
    adds: bool = False
    strict: bool = False
    encloses: bool = False
    one_token: bool = False
    counts: bool = False


# Of the families in support.py, by the class in sglang/srt/multimodal/processors.
READERS = {
    "QwenVLImageProcessor": Reader(ids=True, prepared=True, strict=True),
    "InternVLProcessor": Reader(prepared=True, adds=True, strict=True),
    "LlavaImageProcessor": Reader(ids=True),
    "PaddleOCRVLImageProcessor": Reader(ids=True, strict=True),
    "MiniCPMMultimodalProcessor": Reader(strict=True, encloses=True),
    "DotsVLMImageProcessor": Reader(ids=True, strict=True),
    "Step3VLImageProcessor": Reader(ids=True, strict=True),
    "Glm4vImageProcessor": Reader(ids=True, strict=True, one_token=True),
    "PixtralProcessor": Reader(ids=True, strict=True),
    "LightOnOCRProcessor": Reader(ids=True, strict=True),
    "TransformersAutoMultimodalProcessor": Reader(counts=True),
}


def get_mm_processor(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """AROUND get_mm_processor: of Mistral 3 and Pixtral the tower's own. The one around it
    (multimodal/processors/llava.py) is never initialized, so that `/flush_cache` is an HTTP 500."""
    processor = original(*args, **kwargs)
    return getattr(processor, "inner", processor)


async def tokenize_one_request(
    original: Callable[..., Awaitable[Any]], manager: Any, obj: Any
) -> Any:
    """AROUND TokenizerManager._tokenize_one_request: a ValueError becomes an HTTP 400.

    Nothing that does not fit reaches the scheduler, where it would end the server.
    """
    reader = READERS.get(type(manager.mm_processor).__name__)
    if not (obj.contains_mm_input() or (reader is not None and reader.counts)):
        return await original(manager, obj)
    try:
        if reader is None:
            return await original(manager, obj)
        checked = _Checked(manager, reader, obj)
        tokenized = await original(manager, checked.request)
        checked.look_at(tokenized)
    except ValueError as error:
        # SGLang's own may quote a whole picture.
        if (said := _short(error)) == str(error):
            raise
        raise ValueError(said) from error
    except Exception as error:
        if not _is_of_the_request(error):
            raise
        logger.warning("aircache: a request's pictures cannot be used", exc_info=True)
        raise ValueError(f"the request's pictures cannot be used: {_sentence(error)}") from error
    return tokenized


def run_in_worker(original: Callable[..., Any], executor: Any, *args: Any) -> Any:
    """AROUND MultimodalProcessorExecutor._run: no future can hold a StopIteration, whose request
    would wait for ever."""
    try:
        return original(executor, *args)
    except StopIteration as error:
        raise ValueError("the prompt speaks of more media than the request brings") from error


def get_embedding_and_mask(
    original: Callable[..., Any],
    data_embedding_func: Callable[[list[Any]], Any],
    embedding_items: list[Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """AROUND get_embedding_and_mask: a precomputed embedding is itself, in every model, also beside
    pictures of other requests that the same call encodes; and pictures of several sizes are encoded
    one by one where the model would stack them."""
    if type(getattr(data_embedding_func, "__self__", None)).__name__ in _STACKING:
        data_embedding_func = _of_one_size(data_embedding_func)
    if not any(item.is_precomputed_embedding() for item in embedding_items):
        return original(data_embedding_func, embedding_items, *args, **kwargs)

    def embed(items: list[Any]) -> list[torch.Tensor]:
        raw = [item for item in items if not item.is_precomputed_embedding()]
        encoded = iter(_split(data_embedding_func(raw), raw) if raw else ())
        return [
            item.feature.flatten(0, -2) if item.is_precomputed_embedding() else next(encoded)
            for item in items
        ]

    return original(embed, embedding_items, *args, **kwargs)


def _of_one_size(encode: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """An encoder that is given pictures of one size together, and others one by one."""

    @functools.wraps(encode)
    def embed(items: list[Any]) -> Any:
        if len({item.feature.shape[1:] for item in items}) == 1:
            return encode(items)
        return torch.cat([encode([item]) for item in items])

    return embed


def pad_mm_token_pairs(
    original: Callable[..., Any], input_ids: array[int], mm_inputs: Any, **kwargs: Any
) -> Any:
    """AROUND pad_mm_token_pairs: items that know their place are padded there. SGLang looks for
    start and end tokens, which texts say too, and earlier turns of a session hold."""
    from sglang.srt.managers.mm_utils import pad_mm_tokens

    items = mm_inputs.mm_items
    if items and all(item.offsets and not item.is_audio() for item in items):
        return pad_mm_tokens(input_ids, mm_inputs)
    return original(input_ids, mm_inputs, **kwargs)


class _Checked:
    """A request whose prompt fits what it brings, and what is to be held of it once it is expanded.

    request: the request, its prompt as the processors can read it.
    """

    def __init__(self, manager: Any, reader: Reader, obj: Any) -> None:
        self.request = obj
        self._config, self._processor = manager.model_config, manager.mm_processor
        self._reader = reader
        self._runs: list[tuple[Mark, list[int]]] = []
        self._prepared: set[str] = set()
        for kind in KINDS:
            given = _given(obj, kind)
            dicts = [item for item in given if isinstance(item, dict)]
            prepared = [item for item in dicts if "format" in item or "feature" in item]
            if prepared:
                self._prepared.add(kind)
                self._prepare(kind, prepared[0])
            elif given or reader.strict or reader.counts:
                self._fit(kind, len(given))

    def _prepare(self, kind: str, data: dict[str, Any]) -> None:
        """An embedding or a processor's output; SGLang itself refuses more than one of a kind."""
        if not self._reader.prepared or kind == "sound":
            raise ValueError(
                f"this model reads each {kind} from a file, a URL or base64, and no precomputed "
                "embedding or processor output"
            )
        name = BaseMultimodalProcessor._get_preprocessed_input_format(data)
        if name is None:
            raise ValueError(
                f"the format of a {kind} must be precomputed_embedding or processor_output, got "
                f"{data.get('format')!r}"
            )
        if "precomputed_embeddings" in data:
            raise ValueError(
                f"the precomputed embedding of a {kind} must be given with the format "
                "precomputed_embedding, as its feature"
            )
        feature = _feature(data)
        check_tensor(feature, kind, name.name.lower().replace("_", " "))
        self._check_prepared(kind, data, name, feature)

    def _filled(self, kind: str, data: dict[str, Any]) -> int:
        """Tokens that the prompt, expanded by the caller, keeps for what is given."""
        ids, mark = self.request.input_ids, _mark(self._processor, kind)
        if ids is not None and data.get("offsets") is not None:
            return check_spans(data["offsets"], len(ids), kind)
        if mark is None:
            return 0
        if ids is None:
            return (self.request.text or "").count(mark.token)
        return list(ids).count(mark.token_id)

    def _fit(self, kind: str, given: int) -> None:
        mark = _mark(self._processor, kind)
        obj = self.request
        field = "text" if obj.input_ids is None else "input_ids"
        prompt = getattr(obj, field)
        if mark is None or prompt is None or self._is_llava_video():
            return
        if field == "input_ids" and not self._reader.ids:
            if not given:
                if self._reader.counts:
                    fit(list(prompt), 0, mark)
                return
            raise ValueError(
                "this model's pictures are expanded in the text of a prompt; send text in place of "
                "input_ids"
            )
        prompt, runs = fit(prompt, given, mark, may_add=self._reader.adds)
        self.request = copy.copy(obj)
        setattr(self.request, field, prompt)
        self._runs.append((mark, runs))

    def _is_llava_video(self) -> bool:
        """LLaVA's own processor takes the frames of a video as pictures, with one mark for all."""
        return self._processor.mm_tokens is None and "video" in (self.request.modalities or ())

    def look_at(self, tokenized: Any) -> None:
        """The expanded prompt against what was given. ValueError if they do not fit."""
        ids = tokenized.input_ids
        for mark, runs in self._runs:
            check_runs(runs, ids, mark)
        items = tokenized.mm_inputs.mm_items if tokenized.mm_inputs else []
        for kind, modality in KINDS.items():
            # Transformers' InternVL makes pictures of a video's frames.
            of_kind = [i for i in items if i.modality == modality or not self._reader.strict]
            if _given(self.request, kind) and not of_kind:
                raise ValueError(f"the prompt has no place for the request's {kind}")
            known = _mark(self._processor, kind) if self._reader.encloses else None
            # A prompt that is too long was cut before; SGLang itself refuses it behind this.
            length = len(ids) if kind in self._prepared else sys.maxsize
            for item in of_kind:
                # None where the model itself finds their place, as LLaVA's (models/llava.py).
                if item.offsets is None:
                    continue
                if known is not None:
                    check_enclosed(item.offsets, ids, known)
                filled = check_spans(item.offsets, length, kind)
                if self._reader.one_token:
                    vision = self._processor.hf_config.vision_config
                    _check_grid(kind, item.model_specific_data, filled, vision)

    def _check_prepared(
        self, kind: str, data: dict[str, Any], name: MultimodalInputFormat, feature: torch.Tensor
    ) -> None:
        filled, processor = self._filled(kind, data), self._processor
        # Of Qwen3-Omni the processor has the thinker's.
        vision = processor.hf_config.vision_config
        if name == MultimodalInputFormat.PRECOMPUTED_EMBEDDING:
            # Qwen3-VL's encoder puts out what its deepstack layers add as well.
            parts = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
            check_embedding(feature, filled, self._config.hidden_size * parts, kind)
        elif hasattr(processor, "num_image_token"):
            side, tokens = vision.image_size, processor.num_image_token
            check_tiles(feature, filled, side=side, tokens=tokens, kind=kind)
        if hasattr(vision, "spatial_merge_size") and "mrope_positions" not in data:
            # Of Qwen*-VL: their positions follow from the grid.
            rows = _check_grid(kind, data, filled, vision)
            if name == MultimodalInputFormat.PROCESSOR_OUTPUT:
                channels = getattr(vision, "in_channels", getattr(vision, "in_chans", 3))
                width = channels * vision.temporal_patch_size * vision.patch_size**2
                check_patches(feature, rows, width, kind)


def _check_grid(kind: str, data: dict[str, Any], filled: int, vision: Any) -> int:
    """Patches of a picture's or video's grid, which fill so many tokens."""
    grid = data.get("image_grid_thw" if kind == "picture" else "video_grid_thw")
    return check_grid(grid, filled, merge=vision.spatial_merge_size, kind=kind)


def _given(obj: Any, kind: str) -> list[Any]:
    data = getattr(obj, f"{KINDS[kind].name.lower()}_data")
    return data if isinstance(data, list) else [] if data is None else [data]


def _feature(data: dict[str, Any]) -> Any:
    fields = ("feature", "pixel_values", "pixel_values_videos")
    return next((data[field] for field in fields if field in data), None)


def _mark(processor: Any, kind: str) -> Mark | None:
    """How this model's prompts speak of a picture, video or sound; None where they cannot."""
    known, config = processor.mm_tokens, processor.hf_config
    native, pattern = None, None
    if known is None:  # LLaVA's own processor
        token_id = config.image_token_index if kind == "picture" else None
    elif kind == "picture":
        token_id, native = known.image_token_id, known.image_token
        pattern = known.image_token_regex
    elif kind == "video":
        token_id, native = known.video_token_id, known.video_token
        pattern = known.video_token_regex
        if native is not None and token_id == known.image_token_id:
            # GLM's: what fills its frames stands for pictures.
            token_id = processor._tokenizer.convert_tokens_to_ids(native)
    else:
        token_id, native = known.audio_token_id, known.audio_token
        pattern = known.audio_token_regex
    token = native if token_id is None else processor._tokenizer.convert_ids_to_tokens(token_id)
    if token is None:
        return None
    native = native or token
    return Mark(kind, token, token_id, native, pattern or re.compile(re.escape(native)))


def _split(encoded: Any, items: list[Any]) -> Iterator[torch.Tensor]:
    """What an encoder put out [tokens of all items, width], or a list of it, item by item."""
    if isinstance(encoded, list):
        return iter([one.flatten(0, -2) for one in encoded])
    counts = [sum(end - start + 1 for start, end in item.offsets) for item in items]
    return iter(encoded.flatten(0, -2).split(counts))


def _is_of_the_request(error: BaseException) -> bool:
    """Whether the request made this error: what it brought, and not this machine, is at fault."""
    origin = _origin(error)
    if isinstance(origin, OSError):
        return not isinstance(origin, TimeoutError) and origin.errno in _OF_A_PATH
    return isinstance(origin, _OF_THE_REQUEST)


def _origin(error: BaseException) -> BaseException:
    """What was raised first; SGLang raises RuntimeError anew on the way."""
    while type(error) is RuntimeError and (cause := error.__cause__ or error.__context__):
        error = cause
    return error


def _sentence(error: BaseException) -> str:
    origin = _origin(error)
    said = _short(origin)
    return f"{type(origin).__name__}: {said}" if said else type(origin).__name__


def _short(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return said if len(said) <= 300 else f"{said[:300]}..."
