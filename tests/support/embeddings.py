# SPDX-License-Identifier: Apache-2.0
"""Precomputed embeddings and processor outputs through `sglang.Engine`, right ones and wrong ones.

python -m tests.support.embeddings MODEL POLICY prints one line of JSON a request: what it was
called, what it raised or answered, and whether the engine answers a good request as before.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from aircache_sglang.testing.prompts import picture, user_prompt
from tests.support.families.qwen import QwenReader

SAMPLING = {"max_new_tokens": 4, "temperature": 0.0, "ignore_eos": True}


def embedding_of(reader: QwenReader, inputs: Any) -> torch.Tensor:
    """What SGLang's encoder puts out: [tokens, hidden], and what deepstack layers add, beside."""
    with torch.no_grad():
        found = reader.model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    parts = [found.pooler_output, *(getattr(found, "deepstack_features", None) or ())]
    return torch.cat(parts, dim=1)


def cases(reader: QwenReader) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """A good request, and requests that say the same, or nonsense, in place of its picture."""
    prompt = user_prompt(picture(1, 10, 10), "what is above the small white house?")
    inputs = reader.inputs(prompt)
    ids, grid = inputs["input_ids"][0].tolist(), inputs["image_grid_thw"]
    embedding, pixels = embedding_of(reader, inputs), inputs["pixel_values"]

    def precomputed(feature: Any, **fields: Any) -> dict[str, Any]:
        data = {"format": "precomputed_embedding", "feature": feature, "image_grid_thw": grid}
        return {"input_ids": ids, "image_data": [data | fields]}

    def output(**fields: Any) -> dict[str, Any]:
        data = {"format": "processor_output", "pixel_values": pixels, "image_grid_thw": grid}
        return {"input_ids": ids, "image_data": [data | fields]}

    good = {"prompt": prompt.text, "image_data": list(prompt.images)}
    return good, {
        "right embedding": precomputed(embedding),
        "right embedding in three dimensions": precomputed(embedding[None]),
        "right processor output": output(),
        "expanded ids": {"input_ids": ids, "image_data": list(prompt.images)},
        "wrong short embedding": precomputed(embedding[:-1]),
        "wrong long embedding": precomputed(torch.cat([embedding, embedding])),
        "wrong narrow embedding": precomputed(embedding[:, :-1]),
        "wrong pixels for an embedding": precomputed(pixels),
        "wrong list for an embedding": precomputed(embedding.tolist()),
        "wrong embedding, not expanded": precomputed(embedding) | {"input_ids": collapsed(ids)},
        "wrong embedding, no grid": precomputed(embedding, image_grid_thw=None),
        "wrong embedding for a processor output": output(pixel_values=embedding),
        "wrong grid": output(image_grid_thw=torch.tensor([[1, 4, 4]])),
        "wrong processor output, no grid": output(image_grid_thw=None),
        "wrong processor output, short": output(pixel_values=pixels[:-4]),
        "wrong ids for another size": {
            "input_ids": ids[:20] + ids[21:],
            "image_data": list(prompt.images),
        },
        "wrong offsets": precomputed(embedding, offsets=[(0, 10_000)]),
    }


def collapsed(ids: list[int]) -> list[int]:
    """The ids with each run of one id as one."""
    return [token for index, token in enumerate(ids) if index == 0 or ids[index - 1] != token]


def main(model: str, policy: str) -> None:
    import sglang

    reader = QwenReader(Path(model))
    good, others = cases(reader)
    with sglang.Engine(
        model_path=model,
        device="cpu",
        dtype="float32",
        kv_policy=policy,
        aircache_gate="off",
        log_level="error",
    ) as engine:

        def ask(request: dict[str, Any]) -> dict[str, Any]:
            try:
                answer = engine.generate(**request, sampling_params=SAMPLING)
            except ValueError as error:
                return {"refused": str(error)}
            return {"output_ids": answer["output_ids"], "report": answer["meta_info"]["aircache"]}

        expected = ask(good)
        print(json.dumps({"name": "good", **expected, "alive": True}), flush=True)
        for name, request in others.items():
            found = ask(request)
            alive = ask(good) == expected
            print(json.dumps({"name": name, **found, "alive": alive}), flush=True)
        # One batch, in which the same encoder would be called for all.
        batch = engine.generate(
            input_ids=[others["right embedding"]["input_ids"]] * 2,
            image_data=[others["right embedding"]["image_data"], good["image_data"]],
            sampling_params=SAMPLING,
        )
        for answer in batch:
            found = {"output_ids": answer["output_ids"], "report": answer["meta_info"]["aircache"]}
            print(json.dumps({"name": "right in a batch", **found, "alive": True}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
