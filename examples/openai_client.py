# SPDX-License-Identifier: Apache-2.0
"""One question to a running server, through the OpenAI client, with its own retention.

sglang serve --model-path CHECKPOINT --kv-policy aircache
python -m examples.openai_client http://127.0.0.1:30000 PICTURE "What does this page say?"
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import mimetypes
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
import openai


def data_url(picture: Path) -> str:
    kind = mimetypes.guess_type(picture.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(picture.read_bytes()).decode()}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.openai_client", description=__doc__)
    parser.add_argument("url", help="of the server, without /v1")
    parser.add_argument("picture", type=Path)
    parser.add_argument("question")
    parser.add_argument("--retention", type=float, default=0.05, help="share of visual KV to keep")
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args(argv)
    if not arguments.picture.is_file():
        parser.error(f"{arguments.picture} is not a file")

    # A proxy of the environment must not see a server of this machine.
    client = openai.OpenAI(
        base_url=f"{arguments.url}/v1",
        api_key="none",
        http_client=httpx.Client(trust_env=False),
    )
    try:
        answer = client.chat.completions.create(
            model="default",
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": data_url(arguments.picture)}},
                        {"type": "text", "text": arguments.question},
                    ],
                }
            ],
            max_tokens=arguments.tokens,
            temperature=0.0,
            # By it SGLang's router sends all questions about a picture to one server.
            extra_headers={
                "X-SMG-Routing-Key": hashlib.sha256(arguments.picture.read_bytes()).hexdigest()
            },
            # What the OpenAI protocol does not know goes into the body as it is.
            extra_body={
                "custom_params": {"aircache": {"retention": arguments.retention}},
                "return_meta_info": True,
            },
        )
    except openai.APIConnectionError:
        print(f"No server answers at {arguments.url}.", file=sys.stderr)
        return 1
    except openai.APIStatusError as error:
        print(f"The server refused: {error.message}", file=sys.stderr)
        return 1
    choice = answer.choices[0]
    print(choice.message.content)
    meta = choice.to_dict().get("meta_info") or {}
    report = meta.get("aircache")
    if "aircache" not in meta:
        print("No report: the server runs without --kv-policy aircache, or a router dropped it.")
    elif report is None:
        print("The server kept all of the visual KV.")
    else:
        print(
            f"The server kept {report['columns']} of {report['visual_tokens']} visual tokens' "
            f"slots, split over the layers as {report['layer_budgets']}."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
