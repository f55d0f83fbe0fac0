# SPDX-License-Identifier: GPL-2.0-or-later
"""unionfs: a read-only lower tree and a writable upper shown as one file system."""
