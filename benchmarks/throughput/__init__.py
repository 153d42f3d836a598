# SPDX-License-Identifier: Apache-2.0
"""Prefill, decode and capacity of real servers, by batch size and prompt length."""
