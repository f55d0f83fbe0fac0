# SPDX-License-Identifier: GPL-2.0-or-later
"""Random operations on a union and on a plain copy of its lower, compared step by step."""
