# SPDX-License-Identifier: Apache-2.0
"""The flags, in `sglang.launch_server`, `sglang serve` and `sglang.Engine`, in every process."""

from __future__ import annotations

from sglang.srt.arg_groups.arg_utils import NS, A, Arg
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.server_args import ServerArgs

from aircache_patches import install
from aircache_sglang.config import (
    BUDGET_MODES,
    ELITE_MODES,
    GATE_MODES,
    REUSE_MODES,
    WHEN_MODES,
    AirCacheConfig,
)
from aircache_sglang.policy import policy_names

TARGET = "sglang.srt.server_args.ServerArgs"
_DEFAULT = AirCacheConfig()


class AirCacheServerArgs(ServerArgs):
    """SGLang's arguments and ours; importable by name, since spawned processes unpickle it."""

    kv_policy: A[
        str,
        Arg(
            help="Which visual KV a multimodal request keeps after its prefill. 'none' is stock "
            "SGLang; else a request may name another policy. With a model or a flag that a policy "
            "does not support, no server starts.",
            choices=["none", *policy_names()],
        ),
        NS("memory"),
    ] = "none"
    aircache_retention: A[
        float,
        "Share of the visual KV that is kept, 0 < R <= 1. 1 keeps all and compresses nothing.",
        NS("memory"),
    ] = _DEFAULT.retention
    aircache_alpha: A[
        float,
        "Relevance threshold of the elite observation window, 0 <= alpha <= 1 (AirCache eq. 5).",
        NS("memory"),
    ] = _DEFAULT.alpha
    aircache_budget: A[
        str,
        Arg(
            help="What splits the kept tokens over the layers: one threshold for all of them "
            "('global'), or the paper's eq. 11 ('aircache') and what it is compared with.",
            choices=list(BUDGET_MODES),
        ),
        NS("memory"),
    ] = _DEFAULT.budget
    aircache_window: A[
        str,
        "Observation window: 'elite', 'all' text tokens of the instruction, 'last-N' of them, or "
        "the 'visual-N' last visual tokens.",
        NS("memory"),
    ] = _DEFAULT.window
    aircache_elite: A[
        str,
        Arg(
            help="Whether each query head picks its own elite tokens or all share their mean row.",
            choices=list(ELITE_MODES),
        ),
        NS("memory"),
    ] = _DEFAULT.elite
    aircache_min_visual_tokens: A[
        int,
        "A request with fewer visual tokens is left alone.",
        NS("memory"),
    ] = _DEFAULT.min_visual_tokens
    aircache_reuse: A[
        str,
        Arg(
            help="What later requests may share: 'exact' KV alone, or also the 'compressed' "
            "replica of the pictures that a turn leaves for the next turn.",
            choices=list(REUSE_MODES),
        ),
        NS("memory"),
    ] = _DEFAULT.reuse
    aircache_gate: A[
        str,
        Arg(
            help="Whether a request is left alone whose answer is too short to save what its "
            "compression costs: 'auto', or 'off' to compress it all the same.",
            choices=list(GATE_MODES),
        ),
        NS("memory"),
    ] = _DEFAULT.gate
    aircache_when: A[
        str,
        Arg(
            help="When a request is packed: at the end of its 'prefill', or under 'pressure', when "
            "the KV pool needs the slots, and until then its answer is stock SGLang's.",
            choices=list(WHEN_MODES),
        ),
        NS("memory"),
    ] = _DEFAULT.when
    aircache_rungs: A[
        str,
        "Shares that a request is packed to under pressure, one after the other, as 0.5,0.25,0.1; "
        "the last is the retention, in place of --aircache-retention.",
        NS("memory"),
    ] = ""
    aircache_session_columns: A[
        int | None,
        "The most columns of one conversation: with each new picture the older ones keep less, at "
        "last nothing but their text. Needs --aircache-reuse compressed.",
        NS("memory"),
    ] = None
    aircache_pin_text: A[
        float,
        "Share of the KV pool up to which cached text outlasts visual KV, 0 <= SHARE <= 1.",
        NS("memory"),
    ] = _DEFAULT.pin_text
    aircache_shadow: A[
        float,
        "Share of the compressed answers that are compared with the full KV while the server is "
        "idle, 0 <= S <= 1; `aircache audit` shows what was found.",
        NS("memory"),
    ] = _DEFAULT.shadow
    aircache_guard: A[
        float | None,
        "Raise the retention a rung (0.1, 0.2, 0.5, 1) when the share of tokens that differ is "
        "above B with 95 %% confidence, 0 < B <= 1. Needs --aircache-shadow.",
        NS("memory"),
    ] = _DEFAULT.guard

    aircache_ablation: A[
        str,
        "Knobs for experiments, a JSON object: selection (per-head, shared), merge (0 to 1), "
        "merge_by (position, similar), audience (visual, all), rank, seed, kernel, sinks, floor.",
        NS("memory"),
    ] = "{}"

    aircache_decode: A[
        str,
        Arg(
            help="What compresses, and decodes what is compressed: torch (for a CPU), Triton, or "
            "Triton with FlashInfer's paged decode, whose page tables are written every step.",
            choices=["auto", "torch", "triton", "flashinfer"],
        ),
        NS("memory"),
    ] = "auto"

    def resolve_once(self) -> None:
        """Runs in every process before SGLang uses the arguments (runtime_context.py, publish)."""
        if self.kv_policy == "none":
            super().resolve_once()
            return
        config = install.checked_config(self)
        install.install(self.kv_policy, config, self.disaggregation_mode)
        first = not getattr(self, "_resolution_finished", False)
        super().resolve_once()
        if first:
            install.refuse_unsupported(self)


def register() -> None:
    """Replace SGLang's argument class by ours, everywhere it is named."""
    from sglang.srt.entrypoints.engine import Engine

    HookRegistry.register(TARGET, AirCacheServerArgs, HookType.REPLACE)
    # A class attribute, which the registry's propagation to module globals does not reach.
    Engine.server_args_class = AirCacheServerArgs
