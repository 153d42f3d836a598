# SPDX-License-Identifier: Apache-2.0
"""What faces SGLang: the pool, the radix tree, the attention backend, metrics, and the compressor
that the hooks call. Only this package, the platform, the front end and `aircache_patches` import
SGLang.
"""
