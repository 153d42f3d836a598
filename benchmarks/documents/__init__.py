# SPDX-License-Identifier: Apache-2.0
"""Rendered pages, questions about them, and the small model that reads them."""
