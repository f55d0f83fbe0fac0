# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line: one verb a file, parser beside action."""
