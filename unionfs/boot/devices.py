# SPDX-License-Identifier: GPL-2.0-or-later
"""How long systemd waits for the devices that layers lie on.

It is a setting of the device's own unit, so it goes into a drop-in of that, as for
x-systemd.device-timeout= of a line of fstab.  Called by `unionfs unit` and by the generator.
"""

from collections.abc import Iterable

from unionfs.boot.units import Needs, Unit, unit_name


def drop_ins(named: Iterable[str], seconds: float | None, file: str) -> list[Unit]:
    """For each device among these locators, if a time is said; `file`: what they are called."""
    if seconds is None:
        return []
    text = f"[Unit]\nJobRunningTimeoutSec={seconds:g}s\n"
    nodes = Needs.of(named).devices
    return [Unit(f"{unit_name(node, 'device')}.d/{file}", text) for node in nodes]
