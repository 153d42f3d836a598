# SPDX-License-Identifier: Apache-2.0
"""What cannot be served does not start: one sentence that names it and says what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aircache_patches import support

ROOT = Path(__file__).resolve().parents[2]
POLICY = "--kv-policy aircache"

# Flags, and what the sentence must say.
REFUSED: dict[tuple[str, ...], str] = {
    (
        *("--page-size", "16", "--aircache-reuse", "compressed"),
        *("--aircache-session-columns", "64"),
    ): "with --aircache-session-columns and --page-size 16; use --page-size 1",
    (
        *("--page-size", "16", "--aircache-ablation", '{"audience": "all"}'),
    ): "with --aircache-ablation audience and --page-size 16; use --page-size 1",
    (
        *("--disable-radix-cache", "--aircache-reuse", "compressed"),
    ): "with --aircache-reuse compressed and --disable-radix-cache; drop one of the flags",
    (
        *("--disable-radix-cache", "--aircache-reuse", "compressed"),
        *("--aircache-session-columns", "64"),
    ): "with --aircache-session-columns and --disable-radix-cache; drop one of the flags",
    (
        *("--disable-radix-cache", "--aircache-pin-text", "0.2"),
    ): "with --aircache-pin-text and --disable-radix-cache; drop one of the flags",
    (
        *("--disaggregation-mode", "prefill", "--aircache-reuse", "compressed"),
    ): "--disaggregation-mode prefill does not work with --aircache-reuse compressed; drop one",
    (
        *("--disaggregation-mode", "decode", "--aircache-when", "pressure"),
    ): "--disaggregation-mode decode does not work with --aircache-when pressure; drop one",
    (
        *("--disaggregation-mode", "prefill", "--page-size", "16"),
    ): "--disaggregation-mode prefill does not work with --page-size 16; drop one",
    (
        *("--disaggregation-mode", "decode", "--disaggregation-decode-enable-radix-cache"),
    ): "does not work with --disaggregation-decode-enable-radix-cache; drop one",
    (
        *("--disaggregation-mode", "decode"),
        *("--disaggregation-decode-allocation-policy", "prefill_complete"),
    ): "with --disaggregation-decode-allocation-policy prefill_complete; drop one",
    (
        *("--disaggregation-mode", "prefill", "--disaggregation-transfer-backend", "nixl"),
    ): "does not work with --disaggregation-transfer-backend nixl; drop one",
    (
        *("--aircache-shadow", "0.1", "--enable-hierarchical-cache"),
    ): "--aircache-shadow does not work with --enable-hierarchical-cache; drop one",
    (
        *("--aircache-shadow", "0.1", "--disaggregation-mode", "decode"),
    ): "--aircache-shadow does not work with --disaggregation-mode decode; drop one",
    (
        *("--aircache-shadow", "0.1", "--speculative-algorithm", "NGRAM"),
        "--disable-overlap-schedule",
    ): "--aircache-shadow does not work with --speculative-algorithm NGRAM; drop one",
    ("--aircache-guard", "0.02"): "--aircache-guard needs --aircache-shadow above 0",
    (
        *("--aircache-shadow", "0.1", "--aircache-guard", "0.02"),
        *("--aircache-when", "pressure", "--aircache-rungs", "0.5,0.1"),
    ): "--aircache-guard needs --aircache-rungs unset",
    ("--encoder-only",): "with --encoder-only; drop one",
    ("--language-only",): "with --language-only; drop one",
    ("--enable-deterministic-inference",): "enable-deterministic-inference by its Triton",
    ("--rl-on-policy-target", "fsdp"): "with --rl-on-policy-target by its Triton decode on a CUDA",
    ("--enable-pdmux",): "with --enable-pdmux; drop one",
    (
        *("--enable-hierarchical-cache", "--hicache-storage-backend", "file"),
    ): "with --hicache-storage-backend file; drop one",
    ("--enable-unified-cache-external-linker",): "--enable-unified-cache-external-linker; drop",
    ("--enable-session-radix-cache",): "with --enable-session-radix-cache; drop one",
    ("--enable-streaming-session",): "with --enable-streaming-session; drop one",
    ("--enable-lmcache",): "with --enable-lmcache; drop one",
    ("--enable-flexkv",): "with --enable-flexkv; drop one",
    ("--enable-hisparse",): "with --enable-hisparse; drop one",
    ("--enable-two-batch-overlap",): "with --enable-two-batch-overlap; drop one",
    ("--enable-torch-compile",): "with --enable-torch-compile; drop one",
    ("--attn-dp-size", "2", "--tp-size", "2"): "with --attn-dp-size 2; drop one",
    ("--enable-dp-attention", "--tp-size", "2", "--dp-size", "2"): "with --enable-dp-attention; d",
    ("--attn-cp-size", "2", "--tp-size", "2"): "with --attn-cp-size 2; drop one",
    ("--dcp-size", "2", "--tp-size", "2"): "with --dcp-size 2; drop one",
    ("--pp-size", "2"): "with --pp-size 2; drop one",
    ("--kv-canary", "log"): "with --kv-canary log; drop one",
    ("--kv-cache-dtype", "fp8_e5m2"): "--kv-cache-dtype fp8_e5m2; use auto, bf16 or fp8_e4m3",
    ("--aircache-elite", "shared", "--tp-size", "2"): "--tp-size > 1; use per-head",
    (
        "--attention-backend",
        "flashinfer",
    ): "flashinfer on this cpu device; use --attention-backend torch_native",
    ("--aircache-decode", "flashinfer"): "flashinfer needs a CUDA device, and this server runs",
    ("--radix-cache-backend", "lru"): "cannot use --radix-cache-backend lru; drop one",
    ("--is-embedding",): "drop --is-embedding or --kv-policy",
    ("--aircache-retention", "0"): "--aircache-retention must be a number with 0 < x <= 1, got 0.0",
    ("--aircache-retention", "1.5"): "--aircache-retention must be a number with 0 < x <= 1",
    ("--aircache-retention", "-0.1"): "--aircache-retention must be a number with 0 < x <= 1",
    ("--aircache-retention", "nan"): "--aircache-retention must be a number with 0 < x <= 1",
    ("--aircache-retention", "inf"): "--aircache-retention must be a number with 0 < x <= 1",
    ("--aircache-alpha", "2"): "--aircache-alpha must be a number with 0 <= x <= 1, got 2.0",
    ("--aircache-alpha", "nan"): "--aircache-alpha must be a number with 0 <= x <= 1",
    ("--aircache-window", "last-0"): "--aircache-window must be elite, all, last-N",
    ("--aircache-window", "last-513"): "--aircache-window must be elite, all, last-N",
    ("--aircache-window", "some"): "--aircache-window must be elite, all, last-N",
    ("--aircache-ablation", '{"mege": 1}'): "--aircache-ablation has the unknown key 'mege'; known",
    ("--aircache-ablation", "{"): "--aircache-ablation must be a JSON object, got '{'",
    (*("--kv-policy", "snapkv"), "--aircache-ablation", '{"audience": "all"}'): (
        "--aircache-ablation with audience all does not go with --kv-policy snapkv"
    ),
    (*("--kv-policy", "snapkv"), "--aircache-window", "all"): (
        "--aircache-window must be last-N with policy snapkv, got 'all'"
    ),
    (*("--kv-policy", "h2o"), "--aircache-budget", "strength"): (
        "--aircache-budget is a knob of aircache, not of policy h2o"
    ),
    ("--aircache-ablation", '{"merge_by": "similar"}'): (
        "--aircache-ablation.merge_by is read with merge above 0 alone"
    ),
    ("--aircache-min-visual-tokens", "0"): "--aircache-min-visual-tokens must be an integer >= 1",
}
# The parser itself refuses these, as it does for every flag with choices or a type.
PARSER: dict[tuple[str, ...], str] = {
    ("--kv-policy", "other"): "argument --kv-policy: invalid choice: 'other'",
    ("--aircache-budget", "even"): "argument --aircache-budget: invalid choice: 'even'",
    ("--aircache-elite", "none"): "argument --aircache-elite: invalid choice: 'none'",
    ("--aircache-retention", "few"): "argument --aircache-retention: invalid float value: 'few'",
    ("--aircache-min-visual-tokens", "1.5"): "invalid int value: '1.5'",
}
ENVIRONMENTS = {
    (name, "1"): f"with {name}=1; unset it"
    for name in (
        "SGLANG_RUST_SERVER",
        "SGLANG_ENABLE_METADATA_GLUE_GRAPH",
        "SGLANG_USE_HND_KVCACHE",
    )
}
ACCEPTED: list[tuple[str, ...]] = [
    (),
    ("--tp-size", "2"),
    ("--disable-radix-cache",),
    ("--disable-overlap-schedule", "--chunked-prefill-size", "64"),
    ("--radix-eviction-policy", "lfu"),
    ("--speculative-algorithm", "NGRAM"),
    ("--disaggregation-mode", "prefill"),
    ("--disaggregation-mode", "decode"),
    ("--aircache-retention", "1", "--aircache-window", "last-5", "--aircache-alpha", "0"),
    ("--kv-policy", "h2o", "--tp-size", "2", "--aircache-ablation", '{"merge": 0.5}'),
    ("--aircache-ablation", '{"audience": "all"}'),
]


def environment(**changes: str) -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1"} | changes


def text_model(folder: Path) -> Path:
    """A configuration is all that is read of a model before it is refused."""
    folder.mkdir()
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 512,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def outcomes(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, ...], dict[str, str]]:
    """All command lines through SGLang's parser and resolution, in one process."""
    folder = tmp_path_factory.mktemp("refusals")
    base = ["--model-path", str(checkpoint), "--device", "cpu", "--kv-policy", "aircache"]
    cases: dict[tuple[str, ...], dict[str, Any]] = {
        flags: {"argv": [*base, *flags]} for flags in (*REFUSED, *PARSER, *ACCEPTED)
    }
    for name, value in ENVIRONMENTS:
        cases[(name, value)] = {"argv": base, "env": {name: value}}
    cases[("text",)] = {"argv": [*base, "--model-path", str(text_model(folder / "text"))]}
    (folder / "cases.json").write_text(json.dumps(list(cases.values())))
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.refusals", str(folder / "cases.json")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return dict(zip(cases, lines, strict=True))


@pytest.mark.parametrize("flags", REFUSED, ids=" ".join)
def test_refused(outcomes: dict[tuple[str, ...], dict[str, str]], flags: tuple[str, ...]) -> None:
    outcome = outcomes[flags]
    assert outcome["kind"] == "refusal", outcome
    assert REFUSED[flags] in outcome["message"]
    assert "\n" not in outcome["message"]


@pytest.mark.parametrize("flags", PARSER, ids=" ".join)
def test_refused_by_the_parser(
    outcomes: dict[tuple[str, ...], dict[str, str]], flags: tuple[str, ...]
) -> None:
    outcome = outcomes[flags]
    assert outcome["kind"] == "parser", outcome
    assert PARSER[flags] in outcome["message"]


@pytest.mark.parametrize("variable", ENVIRONMENTS, ids="=".join)
def test_refused_environment(
    outcomes: dict[tuple[str, ...], dict[str, str]], variable: tuple[str, str]
) -> None:
    outcome = outcomes[variable]
    assert outcome["kind"] == "refusal", outcome
    assert outcome["message"].endswith(ENVIRONMENTS[variable])


@pytest.mark.parametrize("flags", ACCEPTED, ids=" ".join)
def test_accepted(outcomes: dict[tuple[str, ...], dict[str, str]], flags: tuple[str, ...]) -> None:
    assert outcomes[flags] == {"kind": "accepted", "message": ""}


def test_a_model_without_pictures(outcomes: dict[tuple[str, ...], dict[str, str]]) -> None:
    outcome = outcomes[("text",)]
    assert outcome["kind"] == "refusal", outcome
    assert "Qwen2ForCausalLM" in outcome["message"]
    assert outcome["message"].endswith("without --kv-policy")


# Fields of resolved arguments: what an ordinary server has, what is refused, and how it is named.
# SGLang itself refuses some of these first on this machine; a server elsewhere has to, too.
FIELDS: dict[str, tuple[Any, Any, str]] = {
    "encoder_only": (False, True, "--encoder-only"),
    "language_only": (False, True, "--language-only"),
    "enable_pdmux": (False, True, "--enable-pdmux"),
    "hicache_storage_backend": (None, "file", "--hicache-storage-backend file"),
    "enable_unified_memory": (False, True, "--enable-unified-memory"),
    "enable_unified_cache_external_linker": (
        *(False, True),
        "--enable-unified-cache-external-linker",
    ),
    "enable_session_radix_cache": (False, True, "--enable-session-radix-cache"),
    "enable_streaming_session": (False, True, "--enable-streaming-session"),
    "enable_lmcache": (False, True, "--enable-lmcache"),
    "enable_flexkv": (False, True, "--enable-flexkv"),
    "enable_hisparse": (False, True, "--enable-hisparse"),
    "enable_page_major_kv_layout": (False, True, "--enable-page-major-kv-layout"),
    "enable_kv_cache_sharding": (False, True, "--enable-kv-cache-sharding"),
    "prefill_only_disable_kv_cache": (False, True, "--prefill-only-disable-kv-cache"),
    "enable_encoder_swa_bounded_replay": (False, True, "--enable-encoder-swa-bounded-replay"),
    "enable_two_batch_overlap": (False, True, "--enable-two-batch-overlap"),
    "enable_torch_compile": (False, True, "--enable-torch-compile"),
    "attn_dp_size": (1, 2, "--attn-dp-size 2"),
    "attn_cp_size": (1, 2, "--attn-cp-size 2"),
    "dcp_size": (1, 4, "--dcp-size 4"),
    "pp_size": (1, 3, "--pp-size 3"),
    "dllm_algorithm": (None, "LowConfidence", "--dllm-algorithm LowConfidence"),
    "kv_canary": ("none", "log", "--kv-canary log"),
}


def fine_on_a_cpu() -> Any:
    """Resolved arguments of which none of FIELDS is refused."""
    view = SimpleNamespace(**{field: fine for field, (fine, _, _) in FIELDS.items()})
    view.device, view.attention_backend, view.aircache_decode = "cpu", "torch_native", "auto"
    view.page_size, view.enable_mixed_chunk, view.disable_radix_cache = 1, False, False
    view.disaggregation_mode = "null"
    view.prefill_attention_backend = view.decode_attention_backend = None
    view.speculative_algorithm = None
    return view


def test_a_backend_is_named_before_what_it_entails(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang gives trtllm_mha, its choice on Blackwell, pages of 64."""
    from sglang.srt.arg_groups import overrides

    view = fine_on_a_cpu()
    view.device, view.attention_backend, view.page_size = "cuda", "trtllm_mha", 64
    monkeypatch.setattr(overrides, "resolving_view", lambda args: view)
    sentence = next(iter(support.unsupported(SimpleNamespace(kv_policy="aircache"))))
    assert sentence == (
        f"{POLICY} does not work with the attention backend trtllm_mha on this cuda device; "
        "use --attention-backend flashinfer or triton"
    )


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_is_refused(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    from sglang.srt.arg_groups import overrides

    _, wrong, shown = FIELDS[field]
    view = fine_on_a_cpu()
    setattr(view, field, wrong)
    monkeypatch.setattr(overrides, "resolving_view", lambda args: view)
    args = SimpleNamespace(kv_policy="aircache", enable_dp_attention=False)
    sentence = next(iter(support.unsupported(args)))
    assert sentence == f"{POLICY} does not work with {shown}; drop one of the two flags"


def test_time_to_live_eviction(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.arg_groups import overrides

    view = fine_on_a_cpu()
    view.radix_eviction_policy = "tlru"
    monkeypatch.setattr(overrides, "resolving_view", lambda args: view)
    sentence = next(iter(support.unsupported(SimpleNamespace(kv_policy="aircache"))))
    assert sentence == f"{POLICY} does not work with --radix-eviction-policy tlru; use lru"


def flashinfer_on(**changes: Any) -> tuple[Any, Any]:
    """Arguments and model of a server that may decode with FlashInfer, but for `changes`."""
    import torch

    values = {"device": "cuda", "backend": "disabled", "dtype": torch.bfloat16, "head_dim": 128}
    values |= changes
    graphs = SimpleNamespace(decode=SimpleNamespace(backend=values["backend"]))
    view = SimpleNamespace(device=values["device"], cuda_graph_config=graphs)
    return view, SimpleNamespace(dtype=values["dtype"], head_dim=values["head_dim"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"device": "cpu"}, "needs a CUDA device, and this server runs on cpu; use auto"),
        ({"backend": "full"}, "no CUDA graph replays; add --cuda-graph-backend-decode disabled"),
        ({"dtype": "float32"}, "needs --dtype bfloat16 or float16, got torch.float32; use"),
        ({"head_dim": 80}, "needs a head size of 64, 128, 256, and the model has 80; use"),
    ],
)
def test_flashinfer_refuses(changes: dict[str, Any], sentence: str) -> None:
    import torch

    if "dtype" in changes:
        changes = {"dtype": getattr(torch, changes["dtype"])}
    assert list(support.unsupported_flashinfer(*flashinfer_on(), POLICY)) == []
    (found,) = support.unsupported_flashinfer(*flashinfer_on(**changes), POLICY)
    assert found.startswith(f"{POLICY} with --aircache-decode flashinfer ") and sentence in found


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"speculative_algorithm": "EAGLE"}, "EAGLE, whose draft layers keep KV that nobody packs"),
        ({"speculative_algorithm": "STANDALONE"}, "use --speculative-algorithm NGRAM or drop one"),
        ({"enable_deterministic_inference": True}, "with --enable-deterministic-inference or"),
        ({"rl_on_policy_target": "fsdp"}, "or --rl-on-policy-target; drop one of the flags"),
        ({"page_size": 16}, "NGRAM does not work with --page-size 16; use 1"),
        ({"disable_overlap_schedule": False}, "NGRAM needs --disable-overlap-schedule; add it"),
    ],
)
def test_speculation_that_is_refused(changes: dict[str, Any], sentence: str) -> None:
    fine = {
        "speculative_algorithm": "NGRAM",
        "enable_deterministic_inference": False,
        "rl_on_policy_target": None,
        "page_size": 1,
        "disable_overlap_schedule": True,
    }
    assert list(support.unsupported_speculation(SimpleNamespace(**fine), POLICY)) == []
    (found,) = support.unsupported_speculation(SimpleNamespace(**fine | changes), POLICY)
    assert found.startswith(POLICY) and sentence in found


def test_flashinfer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: None)
    (found,) = support.unsupported_flashinfer(*flashinfer_on(), POLICY)
    assert found.endswith("needs FlashInfer, which is not installed; use --aircache-decode triton")


# Real starts.

LAUNCH = [sys.executable, "-m", "sglang.launch_server"]
SERVE = [str(Path(sys.executable).with_name("sglang")), "serve"]


def run(argv: list[str], **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, cwd=ROOT, env=environment(**changes), capture_output=True, text=True, timeout=600
    )


def sentence_of(result: subprocess.CompletedProcess[str]) -> str:
    """The one sentence of a refused start; no traceback, no server."""
    assert result.returncode not in (0, None)
    assert "Traceback" not in result.stderr, result.stderr
    assert "Uvicorn running" not in result.stdout + result.stderr
    found = [line for line in result.stderr.splitlines() if line.startswith("aircache: ")]
    assert len(found) == 1, result.stderr
    return found[0]


def server_flags(checkpoint: Path, *flags: str) -> list[str]:
    base = ["--model-path", str(checkpoint), "--device", "cpu", "--host", "127.0.0.1"]
    return [*base, "--kv-policy", "aircache", *flags]


def after(code: str, module: str = "sglang.launch_server") -> list[str]:
    """`python -m module` in a process in which `code` has run."""
    return [
        sys.executable,
        "-c",
        f"{code}\nimport runpy\nrunpy.run_module({module!r}, run_name='__main__', alter_sys=True)",
    ]


@pytest.mark.server
def test_launch_server_refuses(checkpoint: Path) -> None:
    result = run([*LAUNCH, *server_flags(checkpoint, "--kv-canary", "log")])
    assert sentence_of(result) == (
        f"aircache: {POLICY} does not work with --kv-canary log; drop one of the two flags"
    )


@pytest.mark.server
def test_sglang_serve_refuses(checkpoint: Path) -> None:
    result = run([*SERVE, *server_flags(checkpoint, "--aircache-retention", "1.5")])
    assert sentence_of(result) == (
        "aircache: --aircache-retention must be a number with 0 < x <= 1, got 1.5"
    )


@pytest.mark.server
def test_engine_refuses(checkpoint: Path) -> None:
    code = (
        "import sglang\n"
        "if __name__ == '__main__':\n"
        f"    sglang.Engine(model_path={str(checkpoint)!r}, device='cpu', kv_policy='aircache',\n"
        "                  enable_two_batch_overlap=True)\n"
        "    print('Uvicorn running')\n"
    )
    result = run([sys.executable, "-c", code])
    assert sentence_of(result) == (
        f"aircache: {POLICY} does not work with --enable-two-batch-overlap; "
        "drop one of the two flags"
    )


@pytest.mark.server
def test_a_missing_function_of_sglang(checkpoint: Path) -> None:
    code = (
        "from sglang.srt.managers.schedule_batch import ScheduleBatch\n"
        "del ScheduleBatch.prepare_for_extend"
    )
    sentence = sentence_of(run([*after(code), *server_flags(checkpoint)]))
    assert "ScheduleBatch.prepare_for_extend; reinstall SGLang" in sentence


@pytest.mark.server
def test_a_hook_that_the_registry_cannot_apply(checkpoint: Path) -> None:
    """SGLang's registry logs the failure and would go on."""
    code = (
        "from sglang.srt.plugins.hook_registry import HookRegistry as R\n"
        "apply = R._apply_target.__func__\n"
        "def failing(cls, target, hooks):\n"
        "    if target.endswith('kv_private_tokens'):\n"
        "        raise TypeError('broken')\n"
        "    return apply(cls, target, hooks)\n"
        "R._apply_target = classmethod(failing)"
    )
    result = run([*after(code), *server_flags(checkpoint)])
    assert result.returncode != 0
    sentences = [line for line in result.stderr.splitlines() if line.startswith("aircache: ")]
    assert len(sentences) == 1, result.stderr
    assert "pool_stats_observer.kv_private_tokens; reinstall SGLang" in sentences[0]


@pytest.mark.server
def test_another_version_of_sglang(checkpoint: Path) -> None:
    code = "from aircache_patches import ledger\nledger.TESTED_VERSIONS = ('0.5.22', '0.5.24')"
    sentence = sentence_of(run([*after(code), *server_flags(checkpoint)]))
    assert "is tested with SGLang 0.5.22, 0.5.24, found 0.5.23; install one" in sentence


@pytest.mark.server
def test_a_hook_that_fails_in_the_scheduler_process_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if any('spawn_main' in argument for argument in sys.orig_argv):\n"
        "    from aircache_patches import ledger\n"
        "    ledger.TESTED_VERSIONS = ('0.0.0',)\n"
    )
    result = run([*LAUNCH, *server_flags(checkpoint)], PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert "Uvicorn running" not in result.stdout + result.stderr
    assert "is tested with SGLang 0.0.0, found 0.5.23; install one" in result.stderr


@pytest.mark.server
def test_a_plugin_that_is_excluded(checkpoint: Path) -> None:
    result = run([*LAUNCH, *server_flags(checkpoint)], SGLANG_PLUGINS="others")
    assert result.returncode != 0
    assert "unrecognized arguments: --kv-policy aircache" in result.stderr
