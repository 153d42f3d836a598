# SPDX-License-Identifier: Apache-2.0
"""Turns of a session (`/open_session`) that bring pictures, or come after some.

SGLang carries the pictures of earlier turns along, and loses count of them where a turn does not
simply append. docs/bad-requests.md lists the requests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT


def create_req(original: Callable[..., Any], session: Any, recv: Any, *args: Any, **kw: Any) -> Any:
    """AROUND Session.create_req: the pictures of a turn's history are those that it still has."""
    params = recv.session_params
    if params.replace and params.rid is None and not session.streaming:
        # SGLang deletes from the dictionary that it walks over, and twice where a rid came again.
        for node in session.req_nodes.values():
            node.abort()
        session.req_nodes.clear()
    if params.replace and not session.streaming and params.rid in session.req_nodes:
        _end_below(session, session.req_nodes[params.rid])
    before = session.req_nodes.get(recv.rid)
    req = original(session, recv, *args, **kw)
    if isinstance(req.to_finish, FINISH_ABORT):
        # Its prompt is gone, and SGLang would look for the place of the pictures in it.
        recv.mm_inputs = None
        return req
    length = len(req.origin_input_ids) - len(recv.input_ids)
    changes = recv.mm_inputs is not None or bool(params.offset)
    try:
        if req.multimodal_inputs is not None:
            req.multimodal_inputs = history_within(req.multimodal_inputs, length, changes=changes)
        elif any(token >= req.vocab_size for token in req.origin_input_ids[:length]):
            raise ValueError("the session's turn goes on from one whose pictures were dropped")
    except ValueError as error:
        node = session.req_nodes.pop(req.rid)
        if before is not None:
            session.req_nodes[req.rid] = before
        if node.parent is not None:
            node.parent.children.remove(node)
        recv.mm_inputs = None
        req.set_finish_with_abort(str(error))
    return req


def _end_below(session: Any, node: Any) -> None:
    """As SessionReqNode.clear_children, which deletes a rid twice where it came twice."""
    for child in node.children:
        child.abort()
        _end_below(session, child)
        if session.req_nodes.get(child.req.rid) is child:
            del session.req_nodes[child.req.rid]
    node.children = []


def close(original: Callable[..., None], controller: Any, session_id: str) -> None:
    """AROUND SessionController._close: a turn that waits or runs keeps its pictures.

    SGLang drops those of every turn, though the next chunk of one may have to embed them. Turns
    share pictures; left alone, they go with the last of them.
    """
    session = controller.sessions[session_id]
    nodes = session.req_nodes.values()
    if not session.streaming and not all(node.req.finished() for node in nodes):
        session.req_nodes.clear()
    original(controller, session_id)


def check(params: Any) -> None:
    """Raise ValueError for `session_params` that would end the scheduler, or the request in a 500.

    SGLang sends them on as they come (managers/io_struct.py, SessionParams).
    """
    if params is None:
        return
    if not isinstance(params, dict):
        raise ValueError(f"session_params must be an object, got {params!r}")
    for key, value in params.items():
        kind, said = _TYPES.get(key, (None, ""))
        if kind is None:
            raise ValueError(f"session_params has no {key!r}; it has {', '.join(_TYPES)}")
        # A bool is an int to Python.
        if value is not None and type(value) is not kind:
            raise ValueError(f"session_params.{key} must be {said}, got {value!r}")


_TYPES: dict[str, tuple[type, str]] = {
    "id": (str, "a string"),
    "rid": (str, "a string"),
    "offset": (int, "a whole number"),
    "replace": (bool, "true or false"),
    "drop_previous_output": (bool, "true or false"),
}


def history_within(inputs: Any, length: int, *, changes: bool) -> Any:
    """What is left of the pictures of earlier turns; None if nothing is.

    inputs: SGLang's MultimodalInputs of the turn before; length: tokens of the history that this
    turn goes on from, which it may cut; changes: whether it cuts, or brings pictures. Raises
    ValueError for what cannot be gone on from.
    """
    if any(item.offsets is None for item in inputs.mm_items):
        # LLaVA's, whose place the model keeps beside them (models/llava.py, pad_input_ids).
        if changes:
            raise ValueError(
                "a session of this model keeps the pictures of its first turn as they are; send "
                "the whole conversation in one request"
            )
        return inputs
    kept = [item for item in inputs.mm_items if all(end < length for _, end in item.offsets)]
    if len(kept) == len(inputs.mm_items):
        return inputs
    for item in inputs.mm_items:
        if item not in kept and any(start < length for start, _ in item.offsets):
            raise ValueError(
                f"the session's offset {length} cuts through a picture or video; cut before it "
                "or behind it"
            )
    if not kept:
        return None
    inputs = dataclasses.replace(inputs, mm_items=kept, mrope_position_delta_repeated_cache=None)
    if inputs.mrope_positions is not None:
        positions = inputs.mrope_positions[:, :length]
        inputs.mrope_positions = positions
        inputs.mrope_position_delta = (positions.max() + 1 - positions.shape[1]).reshape(1, 1)
    return inputs
