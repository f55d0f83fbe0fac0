# SPDX-License-Identifier: GPL-2.0-or-later
"""The words of the kernel's command line that have to do with a union of the root.

Owns the table WORDS: our own, and those that others have made known.  Does not cut the command line
nor weigh the words against each other: that is cmdline.py, its only caller.
"""

from typing import Final

from unionfs.boot.readers import (
    Reader,
    mode_switch,
    no_effect,
    read_cow_persistent,
    read_crypt,
    read_device,
    read_directory,
    read_encryption,
    read_fallback,
    read_flags,
    read_label,
    read_lower,
    read_mismatch,
    read_mode,
    read_options,
    read_overlay,
    read_overlayroot,
    read_own_size,
    read_persistence,
    read_persistence_label,
    read_persistent,
    read_profile,
    read_session,
    read_session_size,
    read_size_in,
    read_store,
    read_timeout,
    read_toram,
    read_volatile,
    switch,
)

NATIVE: Final = "unionfs."

OWN_WORDS: Final[dict[str, Reader]] = {
    "unionfs.store": read_store,
    "unionfs.dir": read_directory,
    "unionfs.flags": read_flags,
    "unionfs.size": read_own_size,
    "unionfs.mode": read_mode,
    "unionfs.reset": switch("reset"),
    "unionfs.crypt": read_crypt,
    "unionfs.toram": read_toram,
    "unionfs.lower": read_lower,
    "unionfs.timeout": read_timeout,
    "unionfs.fallback": read_fallback,
    "unionfs.on-mismatch": read_mismatch,
    "unionfs.profile": read_profile,
    "unionfs.options": read_options,
}

ARCHISO_WORDS: Final[dict[str, Reader]] = {
    "cow_label": read_label,
    "cow_device": read_device,
    "cow_directory": read_directory,
    "cow_flags": read_flags,
    "cow_spacesize": read_own_size,
    "cow_persistent": read_cow_persistent,
    "copytoram": read_toram,
    "cow_chunksize": no_effect,
    "dm_snap_prefix": no_effect,
    "copytoram_size": no_effect,
}

DRACUT_WORDS: Final[dict[str, Reader]] = {
    "rd.overlay": read_overlay,
    "rd.overlay.readonly": mode_switch("ro"),
    "rd.overlay.reset": switch("reset"),
    "rd.overlay.crypt": read_crypt,
    "rd.live.overlay": read_overlay,
    "rd.live.overlay.readonly": mode_switch("ro"),
    "rd.live.overlay.reset": switch("reset"),
    "rd.live.overlay.size": read_size_in("M"),
    "rd.live.ram": switch("toram"),
    "rd.live.overlay.thin": no_effect,
    "rd.live.overlay.overlayfs": no_effect,
    "rd.live.overlay.cowfs": no_effect,
    "rd.live.overlay.nouserconfirmprompt": no_effect,
}

LIVE_BOOT_WORDS: Final[dict[str, Reader]] = {
    "persistence": read_persistence,
    "nopersistence": mode_switch("ram"),
    "persistence-label": read_persistence_label,
    "persistence-path": read_directory,
    "persistence-read-only": mode_switch("ro"),
    "persistence-encryption": read_encryption,
    "overlay-size": read_size_in(""),
    "toram": read_toram,
    "persistence-media": no_effect,
    "persistence-method": no_effect,
    "persistence-storage": no_effect,
}

OTHER_WORDS: Final[dict[str, Reader]] = {
    # casper
    "persistent": read_persistent,
    "nopersistent": mode_switch("ram"),
    "persistent-path": read_directory,
    # overlayroot
    "overlayroot": read_overlayroot,
    # Yocto's overlayroot
    "overlayrootrwdev": read_device,
    "rootrw": read_device,
    "overlayrootfsflags": read_flags,
    "overlayrootfstype": no_effect,
    # Slax, and Porteus
    "perchdir": read_session,
    "perchsize": read_session_size,
    "changes": read_session,
    "copy2ram": read_toram,
    # systemd
    "systemd.volatile": read_volatile,
}

WORDS: Final[dict[str, Reader]] = (
    OWN_WORDS | ARCHISO_WORDS | DRACUT_WORDS | LIVE_BOOT_WORDS | OTHER_WORDS
)
