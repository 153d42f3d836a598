# SPDX-License-Identifier: Apache-2.0
"""How the command `aircache` asks a running server. Needs neither torch nor SGLang."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any


class Connection:
    """A running server. Every method raises ValueError, in one sentence, for what goes wrong.

    timeout: seconds that one answer may take.
    """

    def __init__(self, url: str, api_key: str | None = None, *, timeout: float = 600.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--url must begin with http:// or https://, got {url!r}")
        self.url = url.rstrip("/")
        self._timeout = timeout
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        # A proxy of the environment must not see a server of this machine.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that a GET, or a POST of `body`, returns."""
        text = self.text(path, body)
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"no server answers at {self.url}: {error}") from error

    def text(self, path: str, body: dict[str, Any] | None = None) -> str:
        """What a GET, or a POST of `body`, returns."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self._headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                read: bytes = response.read()
                return read.decode()
        except urllib.error.HTTPError as error:
            raise ValueError(
                f"the server refused, HTTP {error.code}: {_said(error.read())}"
            ) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ValueError(f"no server answers at {self.url}: {reason}") from error


def _said(body: bytes) -> str:
    """The message of an error's body, in one line."""
    try:
        found = json.loads(body)
    except ValueError:
        found = body.decode(errors="replace")
    while isinstance(found, dict):
        found = found.get("message") or found.get("error") or json.dumps(found)
    return " ".join(str(found).split())
