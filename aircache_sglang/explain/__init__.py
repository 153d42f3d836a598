# SPDX-License-Identifier: Apache-2.0
"""`aircache explain`: what a policy keeps of a picture, on the picture, in one HTML file."""
