# SPDX-License-Identifier: Apache-2.0
"""Elastic Cache (Liu et al., arXiv 2407.18121): attention of the whole prompt, shared by the heads.

Taken, from `ElasticCache` of github.com/liuzuyan/ElasticCache: a token's importance is the
attention that it gets from every query of the prompt, visual ones too, summed over the queries and
averaged over all heads of a layer, which therefore keep the same tokens; each layer as many.
Different: the highest importance is kept, as the paper has it, where the code compares the indices
that `argsort` returns with a rank; what is not kept is dropped, as AirCache's authors ran it
(appendix A), unless the engine is told to merge; the first tokens are kept only if they rank high,
since they are text here, which stays; and the fixed-point eviction while generating is left out,
since generated tokens are never evicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from aircache_sglang.policy.h2o import H2O
from aircache_sglang.policy.registry import register_policy


@register_policy
@dataclass(frozen=True)
class Elastic(H2O):
    """The sums of `H2O` with one selection a layer, uniform budgets."""

    name: ClassVar[str] = "elastic"
    shares_selection: ClassVar[bool] = True
