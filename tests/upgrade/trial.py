# SPDX-License-Identifier: Apache-2.0
"""Running this checkout on another release of SGLang: its hooks, unit tests, real servers."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path

from aircache_patches.install import UPGRADE_CHECK
from tests.upgrade.release import PACKAGE, Release
from tests.upgrade.touched import ROOT

UNIT = (
    *("tests/unit", "--ignore=tests/unit/kernels", "-m", "not gpu"),
    # It holds that the release is a tested one.
    "--deselect=tests/unit/test_patches.py::test_this_sglang_is_a_tested_one",
)
# Stock and compressing servers against each other and against Transformers.
SERVERS = ("tests/integration/test_exactness.py", "-m", "not gpu")

_RAISED = re.compile(r"^E? +([\w.]*(?:Error|Exception|Refusal)\b.*)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was tried: whether it went well, how far it came, and what did not go well."""

    fine: bool
    text: str
    problems: tuple[str, ...] = ()


class Trial:
    """This checkout in an environment where `release` comes before the base's SGLang.

    Logs and pytest's reports go to build/upgrade-VERSION.
    """

    def __init__(self, release: Release) -> None:
        command = [str(ROOT / ".ci" / "env"), "--over", str(release.folder)]
        made = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        self.version, self.folder = release.version, release.folder
        self.python = Path(made.stdout.strip())
        self.environment = os.environ | {
            UPGRADE_CHECK: release.version,
            "PATH": os.pathsep.join((str(self.python.parent), os.environ["PATH"])),
        }
        self.logs = ROOT / "build" / f"upgrade-{release.version}"
        self.logs.mkdir(parents=True, exist_ok=True)

    def hooks(self) -> Outcome:
        """Apply the ledger's hooks, as `aircache doctor` does."""
        done = subprocess.run(
            [self.python, "-m", "aircache_patches.cli", "doctor", "--json"],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        try:
            report = json.loads(done.stdout)
        except ValueError:
            return Outcome(False, "the doctor failed", tuple(done.stderr.strip().splitlines()[-1:]))
        found = report["versions"][PACKAGE]
        assert found == self.version, f"the environment has SGLang {found}"
        hooks, problems = report["hooks"], report["problems"]
        problems += [f"not applied: {hook['target']}" for hook in hooks if not hook["applied"]]
        applied = sum(hook["applied"] for hook in hooks)
        return Outcome(
            report["could_start"] and applied == len(hooks) > 0,
            f"{applied} of {len(hooks)}",
            tuple(problems),
        )

    def tests(self, name: str, arguments: Sequence[str]) -> Outcome:
        """Run pytest; a problem is what tests failed with, how many and the first of them."""
        report, log = self.logs / f"{name}.xml", self.logs / f"{name}.log"
        report.unlink(missing_ok=True)
        with log.open("w") as output:
            done = subprocess.run(
                [str(self.python), "-m", "pytest", *arguments, f"--junitxml={report}"],
                cwd=ROOT,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        where = log.relative_to(ROOT)
        if not report.exists():
            return Outcome(False, f"pytest ended with exit code {done.returncode}; {where}")
        passed, skipped, failed = counted(
            ElementTree.parse(report).iter("testcase"), f"{self.folder}/"
        )
        count = sum(map(len, failed.values()))
        reasons = (f"{said}\n    {len(tests)}: {tests[0]}" for said, tests in failed.items())
        text = f"{passed} passed, {count} failed, {skipped} skipped; {where}"
        return Outcome(done.returncode == 0 and passed > 0, text, tuple(reasons))


def counted(
    cases: Iterable[ElementTree.Element], folder: str
) -> tuple[int, int, dict[str, list[str]]]:
    """Of pytest's report: how many tests passed, were skipped, and which failed for what reason.

    `folder` is left out of the reasons.
    """
    passed, skipped, failed = 0, 0, dict[str, list[str]]()
    for case in cases:
        problems = [*case.findall("failure"), *case.findall("error")]
        if problems:
            said = reason(problems[0]).replace(folder, "")
            failed.setdefault(said, []).append(f"{case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return passed, skipped, failed


def reason(problem: ElementTree.Element) -> str:
    """The last exception that pytest's report of a failure shows, a process's own included."""
    raised = _RAISED.findall(problem.text or "")
    return str(raised[-1]) if raised else (problem.get("message") or "").partition("\n")[0]
