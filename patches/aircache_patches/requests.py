# SPDX-License-Identifier: Apache-2.0
"""Requests and answers in the tokenizer manager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.runtime_context import get_disagg, get_memory, get_schedule

from aircache_patches import process, sessions
from aircache_patches.support import HYBRIDS, NO_STATE
from aircache_sglang.config import REASON_KEY, REQUEST_KEY


def validate_one_request(result: Any, manager: Any, obj: Any, input_ids: Any) -> None:
    """AFTER TokenizerManager._validate_one_request: a ValueError becomes an HTTP 400."""
    session = getattr(obj, "session_params", None)
    sessions.check(session)
    mode = get_disagg().disaggregation_mode
    if mode != "null" and session is not None:
        raise ValueError(
            "session_params needs one server for prefill and decode, and this one has "
            f"--disaggregation-mode {mode}"
        )
    params = getattr(obj, "sampling_params", None)
    if isinstance(params, dict):
        _, config = process.policy_in_force()
        config = config.with_overrides(params.get("custom_params"))
        page_size, knob = get_schedule().page_size, config.needs_single_tokens()
        if page_size > 1 and knob is not None:
            raise ValueError(
                f"{REQUEST_KEY}.{knob} needs --page-size 1, and this server has {page_size}"
            )
        knob = config.needs_one_server()
        if mode != "null" and config.policy != "none" and knob is not None:
            raise ValueError(
                f"{REQUEST_KEY}.{knob} needs one server for prefill and decode, and this one has "
                f"--disaggregation-mode {mode}"
            )
        knob = config.needs_tree()
        if config.policy != "none" and knob is not None:
            if get_memory().disable_radix_cache:
                raise ValueError(
                    f"{REQUEST_KEY}.{knob} needs a radix cache, and this server has "
                    "--disable-radix-cache"
                )
            architecture = (manager.model_config.hf_config.architectures or [""])[0]
            if architecture in HYBRIDS:
                raise ValueError(
                    f"{REQUEST_KEY}.{knob} does not work with {architecture}, {NO_STATE}"
                )


def update_request_meta_info(
    original: Callable[..., None],
    manager: Any,
    meta_info: dict[str, Any],
    state: Any,
    customized_info: dict[str, list[Any]],
    index: int,
    finish_reason: Any,
) -> None:
    """AROUND TokenizerManager.update_request_meta_info: report and reason are one value each, not
    lists that grow by the token, and they are repeated in every chunk of a stream."""
    keys = (REQUEST_KEY, REASON_KEY)
    rest = {key: value for key, value in customized_info.items() if key not in keys}
    original(manager, meta_info, state, rest, index, finish_reason)
    for key in keys:
        fresh = customized_info.get(key, [[]] * (index + 1))[index]
        if fresh:
            setattr(state, key, fresh[-1])
        meta_info[key] = getattr(state, key, None)
