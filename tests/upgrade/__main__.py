# SPDX-License-Identifier: Apache-2.0
"""Whether this project runs on another release of SGLang, and what moved under it.

`make upgrade-check VERSION=...` runs it, docs/upgrading.md says how to read what it prints.
Exit code 0: nothing moved, and all tests pass.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from aircache_patches.ledger import TESTED_VERSIONS
from tests.upgrade import touched
from tests.upgrade.compare import Definition, Moved, Sources, Status, compare
from tests.upgrade.release import PACKAGE, install
from tests.upgrade.trial import SERVERS, UNIT, Outcome, Trial

DIFF_LINES = 40
CORE = f"{PACKAGE}.srt"
# Where our sources define names, which no release of SGLang can take away.
OURS = ("aircache_sglang", "kernels.aircache_kernels", "patches.aircache_patches")


def short(text: str) -> str:
    return text.replace(f"{CORE}.", "").replace(f"{PACKAGE}/srt/", "")


def places(old: Definition | None, new: Definition | None) -> str:
    """file:line in both releases; the file once where it is the same."""
    if old is None or new is None:
        return " -> ".join(short(part.place) if part is not None else "-" for part in (old, new))
    line = new.place.rpartition(":")[2]
    return f"{short(old.place)} -> {f':{line}' if old.path == new.path else short(new.place)}"


def show(moved: Moved, new: Sources, diff: bool, ours: str = "", indent: str = "") -> None:
    """A line for one name, what else is known of it, its diff, then a class's members."""
    name = short(moved.target).rpartition(".")[2] if indent else short(moved.target)
    print(f"  {indent}{moved.status.words:18} {name}  {places(moved.old, moved.new)}")
    further = f"{indent}{'':21}"
    if moved.status and ours:
        print(f"{further}here {ours}")
    if moved.old is not None and moved.new is None:
        elsewhere = new.index(CORE).get(moved.target.rpartition(".")[2], [])
        print(f"{further}of that name: {short(', '.join(elsewhere[:3])) or 'nothing'}")
    if moved.note:
        print(f"{further}{moved.note}")
    if diff:
        print("".join(f"{further}| {line}\n" for line in moved.diff(DIFF_LINES)), end="")
    for member in moved.members:
        show(member, new, diff, indent=indent + "  ")


def compare_all(old: Sources, new: Sources, diff: bool) -> dict[str, list[Status]]:
    """Print what moved, section by section; what became of each name."""
    files = touched.door()
    named, imports, hooks = touched.named(files), touched.imported(files), touched.hook_targets()
    sections = {
        "hooks": hooks,
        "resolution steps": touched.step_targets(),
        "imports": [name for name in imports if name not in hooks],
    }
    found: dict[str, list[Status]] = {}
    for title, targets in sections.items():
        print(f"\n{title}")
        found[title] = []
        for target in targets:
            moved = compare(target, old, new, named)
            found[title].append(moved.status)
            if moved.status or title != "imports":
                show(moved, new, diff, imports.get(target, ""))
    print("\nattributes that our code says, and that no line of the other release defines")
    index = old.index(CORE)
    said = sorted(touched.foreign(files, own_names()) & index.keys())
    found["attributes"] = []
    for name in said:
        found["attributes"].append(Status.UNCHANGED if name in new.index(CORE) else Status.MISSING)
        if found["attributes"][-1]:
            print(f"  {Status.MISSING.words:18} {name}  {short(', '.join(index[name][:2]))} -> -")
    return found


def own_names() -> dict[str, int]:
    """What our sources define, how often, and what every tensor has."""
    import torch

    ours = Sources(touched.ROOT)
    found = dict.fromkeys(dir(torch.Tensor), 2)
    for package in OURS:
        for name, defined in ours.index(package).items():
            found[name] = found.get(name, 0) + len(defined)
    return found


def summary(counts: Mapping[str, list[Status]], outcomes: Mapping[str, Outcome]) -> str:
    """One table: a line a section, then a line for each thing that was tried."""
    width = max(map(len, (*counts, *outcomes)))
    lines = [f"{'':{width}}" + "".join(f"{status.words:>19}" for status in Status)]
    for title, found in counts.items():
        numbers = "".join(f"{found.count(status):19}" for status in Status)
        lines.append(f"{title:{width}}{numbers}")
    for title, outcome in outcomes.items():
        lines.append(f"{title:{width}}  {'yes' if outcome.fine else 'NO':4} {outcome.text}")
    return "\n".join(lines)


def exit_code(counts: Mapping[str, list[Status]], outcomes: Mapping[str, Outcome]) -> int:
    moved = any(status for found in counts.values() for status in found)
    return int(moved or not all(outcome.fine for outcome in outcomes.values()))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.upgrade", description=__doc__)
    parser.add_argument("version", help="of SGLang, as 0.5.24")
    parser.add_argument("--diff", action="store_true", help="show what changed, 40 lines a name")
    parser.add_argument("--unit-flags", default="", help="pytest's, for the unit tests")
    arguments = parser.parse_args(argv)
    spec = find_spec(PACKAGE)
    assert spec is not None and spec.origin is not None, "the environment has no SGLang"
    base = Path(spec.origin).parents[1]
    try:
        release = install(arguments.version, base)
    except ValueError as error:
        parser.error(str(error))
    except subprocess.CalledProcessError as error:
        print(f"upgrade-check: pip failed on {error.cmd[-1]}, see above", file=sys.stderr)
        return 1
    print(f"SGLang {', '.join(TESTED_VERSIONS)} -> {release.version}")
    print("\nrequirements that the base environment does not meet")
    for difference in release.differences:
        print(f"  {difference}")
    counts = compare_all(Sources(base), Sources(release.folder), arguments.diff)

    trial = Trial(release)
    runs = {
        "hooks applied": trial.hooks,
        "unit tests": lambda: trial.tests("unit", [*UNIT, *arguments.unit_flags.split()]),
        "servers": lambda: trial.tests("servers", SERVERS),
    }
    outcomes = {}
    for title, run in runs.items():
        print(f"\n{title}", flush=True)
        outcomes[title] = run()
        for problem in outcomes[title].problems:
            print(f"  {problem}")
    print(f"\n{summary(counts, outcomes)}")
    return exit_code(counts, outcomes)


if __name__ == "__main__":
    sys.exit(main())
