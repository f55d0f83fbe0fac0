# SPDX-License-Identifier: GPL-2.0-or-later
"""The verbs of `unionfs store`, one a file; what they do is in unionfs/stores/."""
