# SPDX-License-Identifier: Apache-2.0
"""`make demo`, with short answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from aircache_sglang.platform import has_accelerator
from examples import demo

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(has_accelerator(), reason="for a machine without an accelerator"),
]


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "new folder" / "selection.png"
    code = demo.main(["--picture", str(picture)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    lines = printed.out.splitlines()
    rows = {line[:24].strip(): line[24:].split() for line in lines if "right answers" not in line}
    n_visual = 16 * 16
    # visual tokens, columns, slots freed, KV tokens in use, ms per token, right answers
    assert rows["none"][:3] == [str(n_visual), "-", "0"]
    full, half = rows["aircache, retention 1"], rows["aircache, retention 0.5"]
    tenth = rows["aircache, retention 0.1"]
    assert full[:3] == [str(n_visual), "-", "0"]
    assert half[1:3] == [str(n_visual // 2), str(n_visual // 2)]
    assert tenth[1:3] == ["26", str(n_visual - 26)]
    asked = str(len(demo.QUESTIONS))
    assert all(row[5:] == [asked, "of", asked] for row in (rows["none"], full, half, tenth))
    # What decode holds beside the visual KV is the text, give or take the step that was read.
    in_use = [int(row[3]) for row in (rows["none"], full, half, tenth)]
    kept = (n_visual, n_visual, n_visual // 2, 26)
    text = [used - visual for used, visual in zip(in_use, kept, strict=True)]
    assert min(text) > 0
    assert max(text) - min(text) <= demo.WATCHED_TOKENS
    with Image.open(picture) as sheet:
        assert sheet.height > 16 * 28


def test_failure_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "FLAGS", (*demo.FLAGS, "--no-such-flag"))
    assert demo.main(["--picture", str(tmp_path / "selection.png")]) == 1
    said = capsys.readouterr().err
    assert said == (
        "The demo failed: the server exited with code 2; "
        f"the servers' logs are {tmp_path / 'demo-*.log'}.\n"
    )
    assert "--no-such-flag" in (tmp_path / "demo-none.log").read_text()
