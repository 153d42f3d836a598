# SPDX-License-Identifier: Apache-2.0
"""Another release of SGLang in a folder next to the base environment, and what it asks for.

The folder holds that release alone and the small packages that it wants in other versions; all
else is the base's (.ci/env --over). A folder that exists is complete: it gets its name last.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement

PACKAGE = "sglang"
# Megabytes, unpacked. What is larger holds compiled CUDA code, which a CPU does not run.
LARGEST = 100
NOTE = "differences.json"


@dataclasses.dataclass(frozen=True)
class Difference:
    """A requirement that the base does not meet.

    held: the base's version, None without one. left_out: why it was not installed, if it was not.
    """

    requirement: str
    wanted_by: str
    held: str | None
    left_out: str | None

    def __str__(self) -> str:
        held = f"the base holds {self.held}" if self.held else "the base has none"
        done = f"not installed, {self.left_out}" if self.left_out else "installed beside"
        return f"{self.wanted_by} asks for {self.requirement}; {held}; {done}"


@dataclasses.dataclass(frozen=True)
class Release:
    """A release beside the base: the folder of its packages, what of its requirements differs."""

    version: str
    folder: Path
    differences: tuple[Difference, ...]


def normal(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def held(folder: Path) -> dict[str, Distribution]:
    """The distributions of a folder by name."""
    return {normal(found.metadata["Name"]): found for found in distributions(path=[str(folder)])}


def unmet(distribution: Distribution, present: dict[str, Distribution]) -> Iterator[Requirement]:
    """The requirements of a distribution, its extras left out, that `present` does not meet."""
    for text in distribution.requires or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = present.get(normal(requirement.name))
        if found is None or not requirement.specifier.contains(found.version, prereleases=True):
            yield requirement


def megabytes(distribution: Distribution) -> float:
    """What its files take, by its own record."""
    return sum(file.size or 0 for file in distribution.files or ()) / 1e6


def install(version: str, base: Path) -> Release:
    """Make the folder next to `base` (its site-packages), or take the one that is there.

    Raises ValueError for what is no version, and CalledProcessError where pip fails.
    """
    if not re.fullmatch(r"\d+(\.\w+)+", version):
        raise ValueError(f"a version of {PACKAGE} looks like 0.5.23, got {version!r}")
    environment = base.parents[2]
    python = environment / "bin" / "python"
    number = environment.name.removeprefix("base-")
    folder = environment.parent / f"{PACKAGE}-{version}-over-{number}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as temporary:
            made = Path(temporary) / "packages"
            _pip(python, "install", "--target", made, f"{PACKAGE}=={version}")
            differences = _complete(made, base, python, Path(temporary))
            shutil.rmtree(made / "bin", ignore_errors=True)  # of no use: .ci/env brings the base's
            (made / NOTE).write_text(json.dumps([dataclasses.asdict(d) for d in differences]))
            made.rename(folder)
    noted = json.loads((folder / NOTE).read_text())
    return Release(version, folder, tuple(Difference(**entry) for entry in noted))


def _complete(made: Path, base: Path, python: Path, temporary: Path) -> list[Difference]:
    """Install what the release, and what is installed for it, wants in another version."""
    base_holds = held(base)
    differences: list[Difference] = []
    waiting, seen = [PACKAGE], {PACKAGE}
    while waiting:
        name = waiting.pop(0)
        present = base_holds | held(made)
        for requirement in unmet(present[name], present):
            wanted = normal(requirement.name)
            if wanted in seen:
                continue
            seen.add(wanted)
            there = base_holds.get(wanted)
            left_out = _install_small(requirement, there, made, python, temporary / wanted)
            if left_out is None:
                waiting.append(wanted)
            text = f"{requirement.name}{requirement.specifier}"
            found = there.version if there is not None else None
            differences.append(Difference(text, name, found, left_out))
    return differences


def _install_small(
    requirement: Requirement, there: Distribution | None, made: Path, python: Path, wheels: Path
) -> str | None:
    """Install one requirement into `made`; else say why not. `there` is what the base has of it."""
    # That tells the size without a download.
    size = megabytes(there) if there is not None else 0.0
    if size <= LARGEST:
        wanted = f"{requirement.name}{requirement.specifier}"
        try:
            # Wheels alone: a source may be a stub that fetches what pip's settings do not know of.
            _pip(python, "download", "--only-binary=:all:", "--dest", wheels, wanted)
        except subprocess.CalledProcessError:
            return "pip got no wheel of it"
        [wheel] = wheels.glob("*.whl")
        size = _unpacked(wheel)
    if size > LARGEST:
        return f"{size:.0f} MB"
    _pip(python, "install", "--target", made, "--upgrade", wheel)
    return None


def _unpacked(wheel: Path) -> float:
    with zipfile.ZipFile(wheel) as archive:
        return sum(entry.file_size for entry in archive.infolist()) / 1e6


def _pip(python: Path, command: str, *arguments: str | Path) -> None:
    options = ["--no-deps", "--quiet", "--disable-pip-version-check"]
    if command == "install":
        options.append("--no-compile")
    subprocess.run([python, "-m", "pip", command, *options, *arguments], check=True)
