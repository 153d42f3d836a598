# SPDX-License-Identifier: Apache-2.0
"""Turns of SGLang's sessions after pictures (patches/aircache_patches/sessions.py)."""

from __future__ import annotations

import re
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.io_struct import CloseSessionReqInput, SessionParams
from sglang.srt.managers.schedule_batch import (
    FINISH_ABORT,
    Modality,
    MultimodalDataItem,
    MultimodalInputs,
)
from sglang.srt.session.session_controller import Session, SessionController

from aircache_patches.sessions import check, close, create_req

VOCABULARY = 1000


class Turn(SimpleNamespace):
    """A finished request, as far as a session looks at it; any further field is None."""

    def __getattr__(self, name: str) -> None:
        return None

    def finished(self) -> bool:
        return True

    def inherit_mm_token_counts(self, other: Any) -> None:
        pass

    def set_finish_with_abort(self, message: str) -> None:
        self.to_finish = FINISH_ABORT(message)
        self.multimodal_inputs = None
        self.origin_input_ids = array("q", [0])


def turn(
    session: Session, name: str, ids: list[int], media: Any = None, **params: Any
) -> tuple[Any, Any]:
    recv = Turn(
        rid=name,
        input_ids=array("q", ids),
        mm_inputs=media,
        session_params=SessionParams(id="session", **params),
    )
    request = create_req(Session.create_req, session, recv, None, VOCABULARY, req_factory=Turn)
    request.output_ids = array("q", [5, 6])
    request.sampling_params = SimpleNamespace(max_new_tokens=2)
    return recv, request


def picture(*offsets: tuple[int, int], **fields: Any) -> MultimodalDataItem:
    return MultimodalDataItem(modality=Modality.IMAGE, offsets=list(offsets), **fields)


@pytest.fixture
def session() -> Session:
    """After one turn of 9 tokens, with pictures at 1 to 2 and 5 to 7."""
    opened = Session(1000, "session")
    _, first = turn(opened, "a", list(range(9)))
    first.multimodal_inputs = MultimodalInputs(
        mm_items=[picture((1, 2)), picture((5, 7))],
        mrope_positions=torch.arange(9).expand(3, -1) // 2,
        mrope_position_delta=torch.tensor([[-4]]),
    )
    return opened


def inherited(session: Session) -> MultimodalInputs:
    inputs: MultimodalInputs = session.req_nodes["a"].req.multimodal_inputs
    return inputs


def test_an_append_inherits_all(session: Session) -> None:
    for media in (None, "a picture"):
        recv, request = turn(session, f"b{media}", [1, 2], media, rid="a")
        assert request.multimodal_inputs is inherited(session) and recv.mm_inputs == media


def test_an_offset_drops_what_it_cuts_off(session: Session) -> None:
    for offset in (3, 4, 5):
        _, request = turn(session, f"b{offset}", [1, 2], rid="a", offset=offset)
        inputs = request.multimodal_inputs
        assert [item.offsets for item in inputs.mm_items] == [[(1, 2)]]
        assert inputs.mrope_positions.shape == (3, offset)
        assert inputs.mrope_position_delta.tolist() == [[(offset - 1) // 2 + 1 - offset]]
    assert len(inherited(session).mm_items) == 2
    _, request = turn(session, "c", [1, 2], rid="a", offset=1)
    assert request.multimodal_inputs is None
    _, request = turn(session, "d", [1, 2], rid="a", offset=8)
    assert request.multimodal_inputs is inherited(session)


@pytest.mark.parametrize("offset", [2, 6, 7])
def test_an_offset_through_a_picture(session: Session, offset: int) -> None:
    recv, request = turn(session, "b", [1, 2], "a picture", rid="a", offset=offset)
    assert f"offset {offset} cuts through a picture" in request.to_finish.message
    assert recv.mm_inputs is None and list(session.req_nodes) == ["a"]
    assert session.req_nodes["a"].children == []


def test_an_unknown_turn_brings_nothing(session: Session) -> None:
    recv, request = turn(session, "b", [1, 2], "a picture", rid="nobody")
    assert "Invalid request session id" in request.to_finish.message
    assert recv.mm_inputs is None and list(session.req_nodes) == ["a"]


def test_replacing_everything(session: Session) -> None:
    turn(session, "b", [1], rid="a")
    turn(session, "c", [1])
    recv, request = turn(session, "d", [1], "a picture", replace=True)
    assert list(session.req_nodes) == ["d"]
    assert request.multimodal_inputs is None and recv.mm_inputs == "a picture"


def test_pictures_that_do_not_know_their_place(session: Session) -> None:
    """LLaVA's: their history may be asked about, and not be added to or cut."""
    session.req_nodes["a"].req.multimodal_inputs = MultimodalInputs(
        mm_items=[MultimodalDataItem(modality=Modality.IMAGE)]
    )
    _, request = turn(session, "b", [1, 2], rid="a")
    assert request.multimodal_inputs is inherited(session)
    for params in ({"media": "a picture"}, {"offset": 4}):
        recv, request = turn(session, f"c{params}", [1, 2], rid="a", **params)
        assert "send the whole conversation in one request" in request.to_finish.message
        assert recv.mm_inputs is None


def test_going_on_from_a_turn_whose_pictures_were_dropped() -> None:
    opened = Session(1000, "session")
    _, first = turn(opened, "a", [1, VOCABULARY + 7, VOCABULARY + 7, 2])
    first.multimodal_inputs = None
    _, request = turn(opened, "b", [1, 2], rid="a")
    assert "whose pictures were dropped" in request.to_finish.message
    _, request = turn(opened, "c", [1, 2], rid="a", offset=1)
    assert request.to_finish is None


def test_replace_above_a_rid_that_came_twice() -> None:
    """The tokenizer manager refuses only the rids of requests in flight."""
    opened = Session(1000, "session")
    turn(opened, "a", [1, 2])
    turn(opened, "b", [3], rid="a")
    turn(opened, "b", [4], rid="a")
    turn(opened, "c", [5], rid="a", replace=True)
    assert set(opened.req_nodes) == {"a", "c"}


def test_replace_above_a_rid_that_went_on_from_itself() -> None:
    opened = Session(1000, "session")
    turn(opened, "c", [1])
    turn(opened, "a", [1, 2], rid="c")
    turn(opened, "a", [3], rid="a")
    turn(opened, "d", [5], rid="c", replace=True)
    assert set(opened.req_nodes) == {"c", "d"}


@pytest.mark.parametrize("running", [True, False])
def test_a_session_that_is_closed_leaves_its_pictures_to_a_turn_that_runs(running: bool) -> None:
    tree = SimpleNamespace(release_radix_session=lambda s: None, release_session=lambda s: None)
    controller = SessionController(tree)
    controller.sessions["session"] = opened = Session(1000, "session")
    _, req = turn(opened, "a", list(range(9)))
    items = [picture((1, 2), feature="pixels")]
    req.multimodal_inputs = MultimodalInputs(mm_items=items)
    req.finished = lambda: not running
    theirs = SessionController._close
    controller._close = lambda id_: close(theirs, controller, id_)  # type: ignore[method-assign]
    controller.close(CloseSessionReqInput(session_id="session"))
    assert "session" not in controller.sessions
    assert (req.multimodal_inputs is not None) == running
    assert (items[0].feature == "pixels") == running


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        (["a"], "session_params must be an object, got ['a']"),
        ({"offset": "x"}, "session_params.offset must be a whole number, got 'x'"),
        ({"offset": 1.5}, "session_params.offset must be a whole number, got 1.5"),
        ({"offset": True}, "session_params.offset must be a whole number, got True"),
        ({"rid": ["a"]}, "session_params.rid must be a string, got ['a']"),
        ({"replace": 1}, "session_params.replace must be true or false, got 1"),
        ({"ofset": 1}, "session_params has no 'ofset'"),
    ],
)
def test_types(params: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(sentence)):
        check(params)


def test_types_that_fit() -> None:
    check(None)
    check({"id": "s", "rid": None, "offset": 3, "replace": True, "drop_previous_output": False})
