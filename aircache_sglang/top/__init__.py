# SPDX-License-Identifier: Apache-2.0
"""`aircache top`: running servers on a terminal."""
