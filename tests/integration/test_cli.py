# SPDX-License-Identifier: Apache-2.0
"""The command `aircache` as a user calls it: in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aircache_sglang import __version__
from aircache_sglang.platform import has_accelerator

pytestmark = pytest.mark.skipif(has_accelerator(), reason="for a machine without an accelerator")

# Imports that `aircache --help` must not need; the doctor must survive their absence.
WITHOUT_ENGINE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("sglang", "torch", "triton"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
from aircache_patches.cli import main
sys.exit(main(sys.argv[1:]))
"""


def aircache(
    *arguments: str, code: str | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    start = ["-m", "aircache_patches.cli"] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | env,
        capture_output=True,
        text=True,
        timeout=280,
    )


def report(*arguments: str, **env: str) -> tuple[int, dict[str, Any]]:
    done = aircache("doctor", "--json", *arguments, **env)
    assert "Traceback" not in done.stderr, done.stderr
    # Nothing else on stdout: machines read it.
    return done.returncode, json.loads(done.stdout)


def test_help_and_version_need_no_engine() -> None:
    shown = aircache("--help", code=WITHOUT_ENGINE)
    assert shown.returncode == 0 and "doctor" in shown.stdout
    assert aircache("--version", code=WITHOUT_ENGINE).stdout == f"aircache-sglang {__version__}\n"


def test_broken_engine_is_a_sentence() -> None:
    done = aircache("doctor", code=WITHOUT_ENGINE)
    assert done.returncode == 1 and done.stderr == ""
    problems = [line for line in done.stdout.splitlines() if line.startswith("Problem: ")]
    assert len(problems) == 1 and "is blocked" in problems[0]


def test_healthy_installation(checkpoint: Path) -> None:
    code, found = report("--model-path", str(checkpoint), "--device", "cpu")
    assert (code, found["could_start"], found["problems"], found["refusals"]) == (0, True, [], [])
    assert found["versions"]["aircache-sglang"] == __version__
    assert found["versions"]["sglang"] in found["tested_versions"]
    assert found["hooks"] and all(hook["exists"] and hook["applied"] for hook in found["hooks"])
    assert (found["device"], found["platform"]) == ("cpu", "PlainCpuPlatform")


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("prefill", "PrefillBootstrapQueue.finalize_bootstrap"),
        ("decode", "DecodePreallocQueue._pre_alloc"),
    ],
)
def test_hooks_of_a_pair(checkpoint: Path, mode: str, name: str) -> None:
    code, found = report(
        *("--model-path", str(checkpoint), "--device", "cpu"), f"--disaggregation-mode={mode}"
    )
    assert (code, found["problems"], found["refusals"]) == (0, [], [])
    assert all(hook["exists"] and hook["applied"] for hook in found["hooks"])
    assert any(hook["target"].endswith(name) for hook in found["hooks"])


def test_every_refusal_is_named_at_once(checkpoint: Path) -> None:
    done = aircache(
        *("doctor", "--model-path", str(checkpoint), "--device", "cpu"),
        *("--kv-canary", "log", "--enable-two-batch-overlap", "--kv-cache-dtype", "fp8_e5m2"),
    )
    assert done.returncode == 1 and done.stderr == ""
    refused = [line for line in done.stdout.splitlines() if line.startswith("Refused: ")]
    assert len(refused) == 3
    for flag in ("--kv-canary log", "--enable-two-batch-overlap", "--kv-cache-dtype fp8_e5m2"):
        assert any(flag in line for line in refused)
    assert done.stdout.endswith("A server with a KV policy would not start.\n")


def test_unsupported_model(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((checkpoint / "config.json").read_text())
    config["architectures"] = ["Qwen2ForCausalLM"]
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, found = report("--model-path", str(tmp_path), "--device", "cpu")
    assert code == 1
    assert any("Qwen2ForCausalLM" in sentence for sentence in found["refusals"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model-path", "/no/such/folder"], "/no/such/folder does not exist"),
        (["--model-path", "{folder}"], "has no config.json"),
        (["--model-path", "{model}", "--pagesize", "4"], "--pagesize"),
        (["--model-path", "{model}", "--aircache-retention", "3"], "--aircache-retention"),
    ],
)
def test_bad_input_is_a_sentence(
    arguments: list[str], words: str, checkpoint: Path, tmp_path: Path
) -> None:
    code, found = report(*(part.format(model=checkpoint, folder=tmp_path) for part in arguments))
    assert code == 1 and not found["could_start"]
    said = found["problems"] + found["refusals"]
    assert len(said) == 1 and words in said[0] and "\n" not in said[0]


def test_flags_without_a_model() -> None:
    done = aircache("doctor", "--page-size", "4")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "aircache doctor: --page-size needs --model-path beside it\n"


def test_plugin_left_out() -> None:
    code, found = report(SGLANG_PLUGINS="another")
    assert code == 1 and len(found["problems"]) == 1
    assert "SGLANG_PLUGINS=another" in found["problems"][0]
