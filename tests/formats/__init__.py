# SPDX-License-Identifier: GPL-2.0-or-later
"""Frozen samples of the formats on disk, and the programs that made them; see README.md."""
