# SPDX-License-Identifier: Apache-2.0
"""What lives inside SGLang: pool, plan, pass, table, attention, radix cache, report.

The way of the data: spans -> stash -> compress -> packing -> table -> attention; `engine.py` holds
the pieces together, and `aircache_patches` calls it from SGLang's own functions.
"""
