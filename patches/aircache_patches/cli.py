# SPDX-License-Identifier: Apache-2.0
"""The command `aircache`: `doctor` says whether this machine can serve with a policy, `cache` draws
the radix tree of a running server (cache_view.py), `explain` shows on a picture what one keeps of
it (aircache_sglang/explain), `audit` says how far its answers are from the full KV (audit.py),
`top` watches servers (aircache_sglang/top).

Nothing here imports SGLang or torch before a subcommand needs them, so that the doctor can speak
where they are missing or broken.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from aircache_sglang import __version__, audit, cache_view
from aircache_sglang.explain import command as explain
from aircache_sglang.top import command as watch

PACKAGES = ("sglang", "torch", "triton", "transformers")
PLUGIN_ENTRY_POINT = ("sglang.srt.plugins", "aircache")


@dataclasses.dataclass(frozen=True, slots=True)
class HookState:
    """One entry of the ledger (aircache_patches/ledger.py) in this process."""

    target: str
    exists: bool
    applied: bool


@dataclasses.dataclass(slots=True)
class Diagnosis:
    """What `aircache doctor` found; `--json` prints these fields.

    versions: distribution to version, None where it is not installed.
    tested_versions: the SGLang versions that the hooks are written for.
    platform, device: SGLang's platform class and the device it runs on.
    accelerators: names of the accelerators that torch sees.
    model: the checkpoint that was asked about.
    refusals: why the policy refuses this model or these flags.
    problems: everything else that keeps a server from starting.
    """

    python: str = dataclasses.field(default_factory=platform.python_version)
    versions: dict[str, str | None] = dataclasses.field(default_factory=dict)
    tested_versions: list[str] = dataclasses.field(default_factory=list)
    hooks: list[HookState] = dataclasses.field(default_factory=list)
    platform: str | None = None
    device: str | None = None
    accelerators: list[str] = dataclasses.field(default_factory=list)
    model: str | None = None
    refusals: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def could_start(self) -> bool:
        """Whether nothing that was looked at keeps a server from starting."""
        return not self.problems and not self.refusals


def installed_version(distribution: str) -> str | None:
    """The version of a distribution, None if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def one_sentence(error: BaseException) -> str:
    """An exception of SGLang or torch in one line."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    name = type(error).__name__
    return f"{name}: {first}" if first else name


@contextlib.contextmanager
def silenced() -> Iterator[io.StringIO]:
    """Keep what SGLang and its parser print and log away from the terminal; yields their stderr."""
    errors = io.StringIO()
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield errors
    finally:
        logging.disable(disabled)


def diagnose(model: str | None, flags: Sequence[str]) -> Diagnosis:
    """Look at the installation and, with a model, at the start of a server with `flags`.

    Installs the hooks in this process. Reads a checkpoint's configuration and loads no weights.
    """
    found = Diagnosis(versions={name: installed_version(name) for name in PACKAGES}, model=model)
    missing = [name for name, known in found.versions.items() if known is None]
    if missing:
        found.problems.append(
            f"{' and '.join(missing)} not installed; install aircache-sglang with its dependencies"
        )
        return found
    checks: list[tuple[str, Callable[[], None]]] = [
        ("asking SGLang for its device", lambda: _check_device(found)),
        ("loading SGLang and its plugins", lambda: _check_flags(found)),
        ("installing the hooks", lambda: _check_hooks(found, mode_of(flags))),
    ]
    if model is not None:
        checks.append(
            ("reading the model and the flags", lambda: _check_start(found, model, flags))
        )
    for subject, check in checks:
        try:
            with silenced():
                check()
        except (Exception, SystemExit) as error:
            found.problems.append(f"{subject} failed with {one_sentence(error)}")
        if found.problems:
            break
    return found


def _check_device(found: Diagnosis) -> None:
    import torch
    from sglang.srt.platforms import current_platform

    kind = torch.accelerator.current_accelerator()
    if torch.accelerator.is_available() and kind is not None:
        module = getattr(torch, kind.type, None)
        name = getattr(module, "get_device_name", lambda i: f"{kind.type}:{i}")
        found.accelerators = [str(name(i)) for i in range(torch.accelerator.device_count())]
    found.platform = type(current_platform).__name__
    found.device = str(current_platform.device_type)


def _check_flags(found: Diagnosis) -> None:
    from sglang.srt.environ import envs
    from sglang.srt.plugins import load_plugins

    load_plugins()
    # The module's name is replaced when the plugin is loaded.
    from sglang.srt import server_args

    if hasattr(server_args.ServerArgs, "kv_policy"):
        return
    group, name = PLUGIN_ENTRY_POINT
    allowed = envs.SGLANG_PLUGINS.get()
    if allowed and name not in [part.strip() for part in allowed.split(",")]:
        reason = f"SGLANG_PLUGINS={allowed} leaves it out; add {name}, or unset the variable"
    else:
        reason = f"reinstall aircache-sglang and look for the entry point {name} of group {group}"
    found.problems.append(f"SGLang did not load the plugin, so --kv-policy is unknown: {reason}")


def mode_of(flags: Sequence[str]) -> str:
    """The --disaggregation-mode among SGLang's flags, whose parser may yet refuse it."""
    pair = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    pair.add_argument("--disaggregation-mode", nargs="?", default="null")
    mode = pair.parse_known_args(flags)[0].disaggregation_mode
    return mode if mode in ("prefill", "decode") else "null"


def _check_hooks(found: Diagnosis, mode: str) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    from aircache_patches import install, ledger
    from aircache_sglang.config import AirCacheConfig
    from aircache_sglang.policy import policy_names

    found.tested_versions = list(ledger.TESTED_VERSIONS)
    missing = set(ledger.missing_targets(mode))
    try:
        install.install(policy_names()[0], AirCacheConfig(), mode)
    except ValueError as refusal:
        found.problems.append(str(refusal))
    found.hooks = [
        HookState(hook.target, hook.target not in missing, hook.target in HookRegistry._patched)
        for hook in ledger.hooks_for(mode)
    ]


def _check_start(found: Diagnosis, model: str, flags: Sequence[str]) -> None:
    """Resolve the arguments as the launcher would, and collect every reason to refuse them."""
    path = Path(model).expanduser()
    if (path.is_absolute() or model.startswith((".", "~"))) and not path.is_dir():
        found.problems.append(f"the model folder {model} does not exist")
        return
    if path.is_dir() and not (path / "config.json").is_file():
        found.problems.append(f"the model folder {model} has no config.json")
        return
    from sglang.srt.server_args import prepare_server_args

    from aircache_patches.support import unsupported
    from aircache_sglang.policy import policy_names

    argv = ["--model-path", model, *flags]
    if not any(flag.split("=")[0] == "--kv-policy" for flag in flags):
        argv += ["--kv-policy", policy_names()[0]]
    with silenced() as errors:
        try:
            server_args = prepare_server_args(argv)
        except SystemExit:
            # argparse has printed its usage, then one line "prog: error: ...".
            said = errors.getvalue().strip().rpartition("error: ")[2].replace("\n", " ")
            found.problems.append(f"SGLang does not accept these flags: {said}")
            return
    if server_args.kv_policy == "none":
        server_args.resolve_once()
        return
    try:
        server_args.resolve_once()
    except ValueError as refusal:
        # A resolved record can be asked for all reasons; SGLang's own complaint ends before that.
        resolved = getattr(server_args, "_resolution_finished", False)
        found.refusals = list(unsupported(server_args)) if resolved else [one_line(refusal)]


def one_line(refusal: ValueError) -> str:
    """What a refusal says: ours is a sentence, SGLang's own may have several lines."""
    return " ".join(str(refusal).split())


def sentences(found: Diagnosis) -> Iterator[str]:
    """The diagnosis for people, a sentence a line; the last one is the verdict."""
    names = {"aircache-sglang": __version__, "Python": found.python, **found.versions}
    known = [f"{name} {number}" for name, number in names.items() if number is not None]
    yield f"Installed: {', '.join(known)}."
    if found.tested_versions:
        sglang = found.versions["sglang"]
        tested = sglang in found.tested_versions
        yield f"SGLang {sglang} is {'a' if tested else 'not a'} tested version."
    if found.device is not None:
        seen = ", ".join(found.accelerators) or "no accelerator"
        yield f"SGLang runs on {found.device} by {found.platform}; torch sees {seen}."
    for hook in found.hooks:
        state = "applied" if hook.applied else "not applied" if hook.exists else "does not exist"
        yield f"Hook {hook.target}: {state}."
    for problem in found.problems:
        yield f"Problem: {problem.rstrip('.')}."
    for refusal in found.refusals:
        yield f"Refused: {refusal.rstrip('.')}."
    if not found.could_start:
        yield "A server with a KV policy would not start."
    elif found.model is None:
        yield "A server could start; --model-path and its flags would be checked, too."
    else:
        yield f"A server with {found.model} would start."


def doctor(arguments: argparse.Namespace, flags: Sequence[str]) -> int:
    if flags and arguments.model_path is None:
        print(f"aircache doctor: {flags[0]} needs --model-path beside it", file=sys.stderr)
        return 1
    found = diagnose(arguments.model_path, flags)
    if arguments.json:
        report: dict[str, Any] = dataclasses.asdict(found)
        report["versions"] = {"aircache-sglang": __version__, **found.versions}
        report["could_start"] = found.could_start
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(sentences(found)))
    return 0 if found.could_start else 1


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="aircache", description="AirCache for SGLang.", allow_abbrev=False
    )
    top.add_argument("--version", action="version", version=f"aircache-sglang {__version__}")
    commands = top.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "doctor",
        help="say what is installed and whether a server could start",
        description="Says what is installed, which hooks apply, which device SGLang uses, and, "
        "with a model, why compression would be refused. Exit code 0 if a server could start.",
        epilog="Further flags are SGLang's own, as for sglang.launch_server; they need a model.",
        allow_abbrev=False,
    )
    command.add_argument("--model-path", metavar="M", help="a checkpoint folder to check")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    cache_view.add_subcommand(commands)
    audit.add_subcommand(commands)
    explain.add_subcommand(commands)
    watch.add_subcommand(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    try:
        code = run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Who reads has seen enough (`aircache doctor | head`); Python must not complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run(argv: Sequence[str] | None) -> int:
    arguments, flags = parser().parse_known_args(argv)
    if arguments.command == "doctor":
        return doctor(arguments, flags)
    if flags:
        parser().error(f"unrecognized arguments: {' '.join(flags)}")
    code: int = arguments.run(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main())
