# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
cd /srv/last || exit
dd if=/dev/urandom of=big bs=1M count=20 status=none
sha256sum big >/out/sum
echo end >end
python3 - <<'END'
import mmap, os
fd = os.open("mapped", os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 1 << 20)
with mmap.mmap(fd, 1 << 20) as memory:
    memory[:] = b"m" * (1 << 20)
END
echo end >/srv/system/etc/end
echo 'the shutdown begins' | systemd-cat
