# SPDX-License-Identifier: GPL-2.0-or-later
"""File systems that layers lie in: images and devices, found, checked, mounted and released."""
