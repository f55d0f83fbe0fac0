# SPDX-License-Identifier: GPL-2.0-or-later
"""Several overlays at once: which paths of a system keep their changes, and where."""
