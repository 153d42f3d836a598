# SPDX-License-Identifier: Apache-2.0
"""What SGLang's arguments become on NVIDIA GPUs that this machine does not have.

SGLang's own resolution, in a process that believes in the device: mocked are torch.cuda's answers
about it and the compiled `sgl_kernel` (tests/support/mocked_gpu.py). Nothing runs on a device, and
no weight is loaded, so what the resolved arguments lead to is shown on a GPU alone.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.arg_groups.arg_utils import field_names
from sglang.srt.server_args import ServerArgs

from aircache_patches import decode_graphs, resolution, support
from aircache_patches.server_args import AirCacheServerArgs
from aircache_sglang.testing.checkpoints import make_qwen2_vl, make_qwen3_5, make_qwen3_vl
from tests.support.mocked_gpu import DEVICES

ROOT = Path(__file__).resolve().parents[2]
POLICY = "--kv-policy aircache"
ON = ("--kv-policy", "aircache")
OFF = ("--kv-policy", "none")
# SGLang 0.5.23's sizes up to 256 (arg_groups/cuda_graph_hook.py).
UP_TO_256 = [1, 2, 4, 8, 12, *range(16, 257, 8)]
FURTHER = [*range(288, 513, 32), *range(576, 1025, 64)]

NGRAM = ("--speculative-algorithm", "NGRAM")
SERIAL = ("--disable-overlap-schedule",)
# A radix cache with recurrent states, and none.
STATES = ("--mamba-radix-cache-strategy", "no_buffer", *SERIAL)
NO_TREE = ("--disable-radix-cache",)
TRTLLM = ("--attention-backend", "trtllm_mha")
FLASHINFER = ("--attention-backend", "flashinfer")

# Device, model, flags; "stock" has no flag of ours and does not even load the plugin.
Case = tuple[str, str, tuple[str, ...]]
TYPICAL: list[tuple[str, tuple[str, ...]]] = [
    ("tiny", ()),
    ("7B", ()),
    ("qwen3", ()),
    ("7B", ("--tp-size", "2")),
    ("7B", ("--tp-size", "8")),
    ("tiny", ("--attention-backend", "triton")),
    ("tiny", ("--attention-backend", "flashinfer")),
    ("tiny", ("--cuda-graph-bs-decode", "1", "8", "96")),
]
STOCK: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "H100": [
        *TYPICAL,
        ("tiny", ("--attention-backend", "fa3")),
        ("tiny", (*NGRAM, *SERIAL)),
    ],
    "B200": [("tiny", ()), ("7B", ("--tp-size", "8"))],
    "RTX 5090": [("tiny", ())],
}
OURS: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "H100": [
        ("7B-long", ()),
        *(("tiny", ("--attention-backend", name)) for name in ("trtllm_mha", "fa4")),
        ("tiny", ("--decode-attention-backend", "flex_attention")),
        ("tiny", ("--aircache-retention", "1")),
        ("tiny", ("--aircache-retention", "0.5")),
        ("tiny", ("--max-running-requests", "300")),
        ("tiny", ("--mem-fraction-static", "0.8")),
        ("tiny", ("--cuda-graph-max-bs-decode", "64")),
        ("tiny", ("--cuda-graph-config", '{"decode": {"max_bs": 64}}')),
        ("tiny", ("--cuda-graph-max-bs-decode", "64", "--max-running-requests", "64")),
        ("tiny", ("--cuda-graph-max-bs-decode", "64", "--aircache-retention", "1")),
        ("tiny", ("--disable-cuda-graph-padding",)),
        ("tiny", ("--disable-decode-cuda-graph",)),
        ("tiny", NGRAM),
        *(("hybrid", flags) for flags in ((), STATES, NO_TREE, (*STATES, *TRTLLM))),
    ],
    "B200": [
        *(("hybrid", (*flags, *FLASHINFER)) for flags in (STATES, NO_TREE)),
        *(("hybrid", flags) for flags in (STATES, NO_TREE, (*STATES, *TRTLLM))),
        ("tiny", ("--decode-attention-backend", "triton")),
        ("tiny", ("--attention-backend", "trtllm_mha")),
        ("tiny", ("--prefill-attention-backend", "trtllm_mha")),
        ("tiny", ("--attention-backend", "fa3")),
        ("tiny", ("--enable-deterministic-inference",)),
        ("tiny", ("--enable-deterministic-inference", "--aircache-decode", "flashinfer")),
        ("tiny", ("--rl-on-policy-target", "fsdp")),
        ("tiny", ("--rl-on-policy-target", "fsdp", "--aircache-decode", "flashinfer")),
    ],
    "RTX 5090": [("tiny", ("--attention-backend", "fa3"))],
}
STOCK_CASES: list[Case] = [(d, *case) for d, cases in STOCK.items() for case in cases]

Resolve = Callable[..., dict[str, Any]]


def seven_billion(folder: Path, context: int) -> Path:
    """Qwen2-VL-7B's shape in a configuration without weights."""
    path = make_qwen2_vl(folder, layers=1) / "config.json"
    config = json.loads(path.read_text())
    config |= {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": context,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "torch_dtype": "bfloat16",
        "vocab_size": 152064,
    }
    config["rope_scaling"]["mrope_section"] = [16, 24, 24]
    config["vision_config"] |= {"depth": 32, "embed_dim": 1280, "hidden_size": 3584}
    path.write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gpu-arguments")
    return {
        "tiny": make_qwen2_vl(folder / "tiny", layers=1),
        "qwen3": make_qwen3_vl(folder / "qwen3"),
        "hybrid": make_qwen3_5(folder / "hybrid"),
        "7B": seven_billion(folder / "7B", 32768),
        "7B-long": seven_billion(folder / "7B-long", 131072),
    }


@pytest.fixture(scope="module")
def resolve(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Resolve:
    """One process a device, when it is first asked for, in which all its cases are resolved."""
    outcomes: dict[str, dict[Any, dict[str, Any]]] = {}

    def run(device: str) -> dict[Any, dict[str, Any]]:
        groups = {"stock": STOCK[device], OFF: STOCK[device], ON: STOCK[device] + OURS[device]}
        path = tmp_path_factory.mktemp("groups") / "groups.json"
        path.write_text(
            json.dumps(
                [
                    {
                        "plugin": which != "stock",
                        "argv": [
                            [
                                *("--model-path", str(models[model]), "--random-seed", "1"),
                                *flags,
                                *(() if which == "stock" else which),
                            ]
                            for model, flags in cases
                        ],
                    }
                    for which, cases in groups.items()
                ]
            )
        )
        result = subprocess.run(
            [sys.executable, "-m", "tests.support.mocked_gpu", device, str(path)],
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, result.stderr
        lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
        keys = [(*case, which) for which, cases in groups.items() for case in cases]
        return dict(zip(keys, lines, strict=True))

    def outcome(device: str, *flags: str, model: str = "tiny", which: Any = ON) -> dict[str, Any]:
        if device not in outcomes:
            outcomes[device] = run(device)
        return outcomes[device][model, flags, which]

    return outcome


@pytest.fixture
def accepted(resolve: Resolve) -> Resolve:
    def arguments(*args: Any, **kwargs: Any) -> dict[str, Any]:
        found = resolve(*args, **kwargs)
        assert found["kind"] == "accepted", found
        return found["message"]

    return arguments


@pytest.fixture
def refused(resolve: Resolve) -> Callable[..., str]:
    def sentence(*args: Any, **kwargs: Any) -> str:
        found = resolve(*args, **kwargs)
        assert found["kind"] == "refusal", found
        return found["message"]

    return sentence


# Stock


@pytest.mark.parametrize("case", STOCK_CASES, ids=str)
def test_without_a_policy_every_argument_is_stock(accepted: Resolve, case: Case) -> None:
    device, model, flags = case
    stock = accepted(device, *flags, model=model, which="stock")
    assert len(stock["all"]) > 300
    assert accepted(device, *flags, model=model, which=OFF) == stock


def test_what_the_mocked_devices_are(accepted: Resolve) -> None:
    """SGLang's defaults on them, which the tests below depart from."""
    found = {device: accepted(device, which="stock") for device in DEVICES}
    assert {
        device: (
            args["attention_backend"],
            args["page_size"],
            args["chunked_prefill_size"],
            args["decode"]["max_bs"],
        )
        for device, args in found.items()
    } == {
        "H100": ("fa3", 1, 8192, 256),
        "B200": ("trtllm_mha", 64, 16384, 512),
        "RTX 5090": ("flashinfer", 1, 4096, 48),
    }


@pytest.mark.parametrize("case", STOCK_CASES, ids=str)
def test_a_policy_changes_what_it_must_alone(accepted: Resolve, case: Case) -> None:
    device, model, flags = case
    stock = accepted(device, *flags, model=model, which="stock")["all"]
    ours = accepted(device, *flags, model=model)["all"]
    assert ours["radix_cache_backend"] == "'aircache'"
    changed = {name for name, value in stock.items() if ours[name] != value}
    assert changed <= {
        "attention_backend",
        "cuda_graph_config",
        "mem_fraction_static",
        "page_size",
        "radix_cache_backend",
    }
    if stock["attention_backend"] != "'trtllm_mha'":
        assert not changed & {"attention_backend", "page_size"}


# Attention backends


@pytest.mark.parametrize(
    ("device", "flags", "model", "backends"),
    [
        ("H100", (), "tiny", ("fa3", None)),
        ("H100", (), "qwen3", ("fa3", "flashinfer")),
        ("H100", ("--attention-backend", "fa3"), "tiny", ("fa3", None)),
        ("H100", ("--attention-backend", "triton"), "tiny", ("triton", None)),
        ("H100", ("--attention-backend", "flashinfer"), "tiny", ("flashinfer", None)),
        ("B200", (), "tiny", ("flashinfer", None)),
        ("B200", ("--tp-size", "8"), "7B", ("flashinfer", None)),
        ("B200", ("--decode-attention-backend", "triton"), "tiny", ("flashinfer", "triton")),
        ("RTX 5090", (), "tiny", ("flashinfer", None)),
    ],
)
def test_served_backend(
    accepted: Resolve,
    device: str,
    flags: tuple[str, ...],
    model: str,
    backends: tuple[str, str | None],
) -> None:
    args = accepted(device, *flags, model=model)
    assert (args["attention_backend"], args["decode_attention_backend"]) == backends
    assert args["page_size"] == 1


def test_another_default_is_logged(resolve: Resolve) -> None:
    sentence = "aircache: the attention backend is flashinfer; SGLang's default here, trtllm_mha,"
    assert [line for line in resolve("B200")["log"] if line.startswith(sentence)]
    assert not [line for line in resolve("H100")["log"] if "attention backend" in line]


@pytest.mark.parametrize(
    ("device", "flags", "advice"),
    [
        ("H100", ("--attention-backend", "trtllm_mha"), "flashinfer or triton or fa3"),
        ("H100", ("--attention-backend", "fa4"), "flashinfer or triton or fa3"),
        ("H100", ("--decode-attention-backend", "flex_attention"), "flashinfer or triton or fa3"),
        ("B200", ("--attention-backend", "trtllm_mha"), "flashinfer or triton"),
        ("B200", ("--prefill-attention-backend", "trtllm_mha"), "flashinfer or triton"),
        ("B200", ("--attention-backend", "fa3"), "flashinfer or triton"),
        ("RTX 5090", ("--attention-backend", "fa3"), "flashinfer or triton"),
    ],
)
def test_a_chosen_backend_is_not_replaced(
    refused: Callable[..., str], device: str, flags: tuple[str, ...], advice: str
) -> None:
    assert refused(device, *flags) == (
        f"{POLICY} does not work with the attention backend {flags[1]} on this cuda device; "
        f"use --attention-backend {advice}"
    )


@pytest.mark.parametrize(
    "flags", [("--enable-deterministic-inference",), ("--rl-on-policy-target", "fsdp")]
)
def test_answers_that_no_batch_changes(
    accepted: Resolve, refused: Callable[..., str], flags: tuple[str, ...]
) -> None:
    assert accepted("B200", *flags)["attention_backend"] in ("flashinfer", "triton")
    assert refused("B200", *flags, "--aircache-decode", "flashinfer") == (
        f"{POLICY} works with {flags[0]} by its Triton decode on a CUDA device alone, since "
        "another follows what else is in the batch; drop one of the two flags"
    )


def test_speculation_keeps_the_graphs_of_stock(
    accepted: Resolve, refused: Callable[..., str]
) -> None:
    assert refused("H100", *NGRAM).endswith("NGRAM needs --disable-overlap-schedule; add it")
    stock, ours = (accepted("H100", *NGRAM, *SERIAL, which=which) for which in ("stock", ON))
    assert ours["decode"] == stock["decode"] and stock["decode"]["backend"] == "full"


# Decode graphs


def reserved(accepted: Resolve, device: str, *flags: str, model: str = "tiny") -> float:
    """MiB that we keep free beyond SGLang's budget."""
    stock = accepted(device, *flags, model=model, which="stock")["mem_fraction_static"]
    ours = accepted(device, *flags, model=model)["mem_fraction_static"]
    return (stock - ours) * DEVICES[device][2]


def test_graphs_for_the_batches_that_packing_makes_room_for(
    accepted: Resolve, resolve: Resolve
) -> None:
    """On an H100 four times SGLang's 256; 2 MiB and a row of the page table for each request more,
    8 MiB for the second graph of each size.
    """
    decode = accepted("H100")["decode"]
    assert (decode["bs"], decode["max_bs"]) == (UP_TO_256 + FURTHER, 1024)
    assert reserved(accepted, "H100") == pytest.approx(768 * (2 + 32768 * 8 / 2**20) + 52 * 8)
    (line,) = resolve("H100")["log"]
    assert "up to 1024 (SGLang's default: 256), two for each of 52 sizes; 2.1 GiB" in line


@pytest.mark.parametrize(
    ("device", "flags", "model", "largest"),
    [
        ("H100", (), "7B", 1024),
        ("H100", ("--tp-size", "2"), "7B", 1024),
        # SGLang's 512 times four would take more than a 32nd of the memory.
        ("H100", ("--tp-size", "8"), "7B", 1408),
        ("B200", ("--tp-size", "8"), "7B", 2048),
        ("RTX 5090", (), "tiny", 192),
    ],
)
def test_the_largest_batch(
    accepted: Resolve, device: str, flags: tuple[str, ...], model: str, largest: int
) -> None:
    stock = accepted(device, *flags, model=model, which="stock")["decode"]["bs"]
    sizes = accepted(device, *flags, model=model)["decode"]["bs"]
    assert sizes[: len(stock)] == stock and sizes[-1] == largest
    assert 0 < reserved(accepted, device, *flags, model=model) <= DEVICES[device][2] / 32


def test_a_long_context_costs_larger_tables(accepted: Resolve) -> None:
    """Three MiB a request, so that the budget ends before 1,024."""
    sizes = accepted("H100", model="7B-long")["decode"]["bs"]
    assert sizes == (UP_TO_256 + FURTHER)[: len(sizes)]
    following = (UP_TO_256 + FURTHER)[len(sizes)]
    spent = (sizes[-1] - 256) * 3 + len(sizes) * 8
    budget = DEVICES["H100"][2] / 32
    assert spent <= budget < spent + (following - sizes[-1]) * 3 + 8


def test_less_compression_makes_less_room(accepted: Resolve) -> None:
    """Retention 1 fills no pool with more requests, but captures the second graph all the same:
    a request may ask for less.
    """
    half = accepted("H100", "--aircache-retention", "0.5")
    assert half["decode"]["max_bs"] == 438
    none = accepted("H100", "--aircache-retention", "1")
    assert none["decode"]["bs"] == UP_TO_256
    stock = accepted("H100", which="stock")["mem_fraction_static"]
    assert (stock - none["mem_fraction_static"]) * DEVICES["H100"][2] == pytest.approx(36 * 8)


def test_no_graph_that_no_batch_fills(accepted: Resolve) -> None:
    sizes = accepted("H100", "--max-running-requests", "300")["decode"]["bs"]
    assert sizes == [*UP_TO_256, 288, 300]


@pytest.mark.parametrize(
    ("flags", "sizes", "flag"),
    [
        (("--cuda-graph-bs-decode", "1", "8", "96"), [1, 8, 96], "--cuda-graph-bs-decode"),
        (("--cuda-graph-max-bs-decode", "64"), None, "--cuda-graph-max-bs-decode"),
        (("--cuda-graph-config", '{"decode": {"max_bs": 64}}'), None, "--cuda-graph-config"),
        (("--mem-fraction-static", "0.8"), UP_TO_256, "--cuda-graph-max-bs-decode"),
        (("--disable-cuda-graph-padding",), [*range(1, 257)], "--cuda-graph-max-bs-decode"),
    ],
)
def test_the_operators_choice_stays(
    resolve: Resolve, flags: tuple[str, ...], sizes: list[int] | None, flag: str
) -> None:
    """With one warning that names the flag to change."""
    found = resolve("H100", *flags)
    sizes = sizes or UP_TO_256[: UP_TO_256.index(64) + 1]
    assert found["message"]["decode"]["bs"] == sizes
    assert found["log"] == [
        "aircache: 2048 requests may run at once, and decode steps of more than "
        f"{sizes[-1]} run without a CUDA graph; raise {flag}, or lower --max-running-requests."
    ]
    if flags[0] == "--mem-fraction-static":
        assert found["message"]["mem_fraction_static"] == 0.8


@pytest.mark.parametrize(
    "flags",
    [
        ("--cuda-graph-max-bs-decode", "64", "--max-running-requests", "64"),
        ("--cuda-graph-max-bs-decode", "64", "--aircache-retention", "1"),
        ("--disable-decode-cuda-graph",),
    ],
)
def test_no_warning_without_need(resolve: Resolve, flags: tuple[str, ...]) -> None:
    found = resolve("H100", *flags)
    assert found["kind"] == "accepted" and found["log"] == []


@pytest.mark.parametrize(("largest", "target"), [(8, 32), (48, 192), (256, 1024), (512, 2040)])
def test_further_sizes_pad_by_an_eighth_at_most(largest: int, target: int) -> None:
    sizes = decode_graphs.further_sizes(largest, target)
    assert sizes[-1] == target and sizes == sorted(set(sizes))
    for below, size in zip([largest, *sizes], sizes, strict=False):
        assert below < size and (size - below <= 8 or size - below <= below / 8)
    assert decode_graphs.further_sizes(target, largest) == []


# Names


@pytest.fixture(scope="module")
def options() -> dict[str, argparse.Action]:
    """SGLang's parser, and the flags that its copy of our fields adds."""
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    theirs = field_names(ServerArgs)
    for name in sorted(set(field_names(AirCacheServerArgs)) - set(theirs)):
        parser.add_argument("--" + name.replace("_", "-"))
    return parser._option_string_actions


@pytest.mark.parametrize("row", support._FLAGS, ids=[row[2] for row in support._FLAGS])
def test_a_flag_of_the_table_sets_its_field(
    options: dict[str, argparse.Action], row: tuple[str, Any, str]
) -> None:
    field, _, flag = row
    assert options[flag].dest == field


@pytest.mark.parametrize("module", [support, resolution, decode_graphs])
def test_every_flag_that_is_named_exists(options: dict[str, argparse.Action], module: Any) -> None:
    named = set(re.findall(r"--[a-z][a-z0-9-]*[a-z0-9]", inspect.getsource(module)))
    assert named and named <= set(options), named - set(options)


@pytest.mark.parametrize("variable", support._VARIABLES)
def test_every_variable_exists(variable: str) -> None:
    from sglang.srt.environ import envs

    assert getattr(envs, variable).get() is False


@pytest.mark.parametrize(
    ("device", "flags", "backend"),
    [
        ("H100", STATES, "fa3"),
        ("H100", NO_TREE, "fa3"),
        ("B200", STATES, "triton"),
        ("B200", (*STATES, *FLASHINFER), "flashinfer"),
        ("B200", (*NO_TREE, *FLASHINFER), "flashinfer"),
    ],
)
def test_a_hybrid_is_served(
    accepted: Resolve, device: str, flags: tuple[str, ...], backend: str
) -> None:
    args = accepted(device, *flags, model="hybrid")
    assert (args["attention_backend"], args["page_size"]) == (backend, 1)


@pytest.mark.parametrize(
    ("device", "flags", "sentence"),
    [
        ("H100", (), "add --mamba-radix-cache-strategy no_buffer --disable-overlap-schedule, or"),
        ("H100", (*STATES, *TRTLLM), "radix cache and --attention-backend trtllm_mha; use another"),
        ("B200", (*STATES, *TRTLLM), "radix cache and --attention-backend trtllm_mha; use another"),
        ("B200", NO_TREE, "the attention backend trtllm_mha on this cuda device; use --attention"),
    ],
)
def test_a_hybrid_is_refused(
    refused: Callable[..., str], device: str, flags: tuple[str, ...], sentence: str
) -> None:
    assert sentence in refused(device, *flags, model="hybrid")
