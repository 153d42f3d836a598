# SPDX-License-Identifier: Apache-2.0
"""Stands in for torchcodec where a test server must read video: its ffmpeg is a system package.

Decodes animated PNGs, losslessly, with the part of torchcodec's interface that SGLang and
Transformers use. Everything after the decoder is their own.
"""
