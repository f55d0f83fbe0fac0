# SPDX-License-Identifier: GPL-2.0-or-later
"""CAP_SYS_RESOURCE: root has it, and uses it only where it is wanted (docs/adr/0029).

Owns when a thread has it in effect; every thread started from one that has lowered it begins
without.  Called by daemon.py, and by stores/resizing.py for a mounted ext4.
"""

import contextlib
from collections.abc import Iterator
from typing import Final

from unionfs import syscalls

CAP_SYS_RESOURCE: Final = 24


def obey_quotas(capability: int = CAP_SYS_RESOURCE) -> None:
    """Lower it in this thread; it stays permitted.  In vain where capset(2) is filtered out."""
    with contextlib.suppress(OSError):
        syscalls.set_effective(capability, on=False)


@contextlib.contextmanager
def in_effect(capability: int = CAP_SYS_RESOURCE) -> Iterator[None]:
    """For this thread, while it lasts; where it is not permitted, the call that needs it tells."""
    raised = False
    with contextlib.suppress(OSError):
        raised = syscalls.set_effective(capability, on=True)
    try:
        yield
    finally:
        if raised:
            syscalls.set_effective(capability, on=False)


__all__ = ["CAP_SYS_RESOURCE", "in_effect", "obey_quotas"]
