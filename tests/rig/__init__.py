# SPDX-License-Identifier: GPL-2.0-or-later
"""What the mount tests stand on: ground, mounts, snapshots, ordinary users."""
