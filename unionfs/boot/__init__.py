# SPDX-License-Identifier: GPL-2.0-or-later
"""Starting a system whose root is a union."""
