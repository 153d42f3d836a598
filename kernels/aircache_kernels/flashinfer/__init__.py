# SPDX-License-Identifier: Apache-2.0
"""Decode attention by FlashInfer's paged decode: page tables of all layers, and one plan for them.

Never run on a GPU.
"""
