# SPDX-License-Identifier: Apache-2.0
"""What happens to a request's KV; knows no SGLang.

The way of the data: spans -> stash -> compress -> packing -> table -> decode, extend. What holds
the pieces together, and faces SGLang, is `aircache_sglang.engine`.
"""
