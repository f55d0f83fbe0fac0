# SPDX-License-Identifier: GPL-2.0-or-later
"""A tiny file system in memory in place of the union, to test the daemon without it.

Run as a program it mounts itself: `python -m tests.standin JSON` with the fields of MountOptions.
Its files tell what the daemon did: `facts` (JSON), and `asked`, one line for each creation with
the mode and umask that the handler got.  Reading `crash` raises an exception that no handler
should let out; `slow` takes half a second in a worker thread.
"""

import errno
import json
import os
import stat
import sys
import time
from dataclasses import dataclass, field

import pyfuse3
import trio

from unionfs.daemon import run
from unionfs.errors import UnionfsError
from unionfs.layer import Layer
from unionfs.options import MountOptions
from unionfs.work import Work

SPECIAL = (b"facts", b"asked", b"crash", b"slow")


@dataclass
class Node:
    """One inode."""

    number: int
    mode: int
    data: bytearray = field(default_factory=bytearray)
    names: dict[bytes, "Node"] = field(default_factory=dict)


class Memory(pyfuse3.Operations):
    """Directories and files, no rename, no removal."""

    enable_acl = False

    def __init__(self) -> None:
        super().__init__()
        self.root = Node(pyfuse3.ROOT_INODE, stat.S_IFDIR | 0o755)
        self.nodes = {self.root.number: self.root}
        self.facts: dict[str, object] = {}
        self.asked: list[str] = []
        for name in SPECIAL:
            self.add(self.root, name, stat.S_IFREG | 0o644)

    def add(self, parent: Node, name: bytes, mode: int) -> Node:
        node = Node(len(self.nodes) + 1, mode)
        self.nodes[node.number] = parent.names[name] = node
        return node

    def content(self, node: Node) -> bytes:
        if node is self.root.names[b"facts"]:
            return json.dumps(self.facts).encode()
        if node is self.root.names[b"asked"]:
            return "".join(self.asked).encode()
        return bytes(node.data)

    def entry(self, node: Node) -> pyfuse3.EntryAttributes:
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino = node.number
        attributes.st_mode = node.mode
        attributes.st_size = 100 if node.number <= len(SPECIAL) + 1 else len(node.data)
        attributes.st_uid = os.geteuid()
        attributes.st_gid = os.getegid()
        attributes.attr_timeout = attributes.entry_timeout = 0
        return attributes

    async def lookup(self, parent, name, ctx):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
        node = self.nodes[parent].names.get(name)
        if node is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self.entry(node)

    async def getattr(self, inode, ctx):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
        return self.entry(self.nodes[inode])

    async def setattr(self, inode, attr, fields, fh, ctx):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
        if fields.update_size:
            del self.nodes[inode].data[attr.st_size :]
        return self.entry(self.nodes[inode])

    async def mkdir(self, parent, name, mode, ctx):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
        self.asked.append(f"{name.decode()} {mode:o} {ctx.umask:o}\n")
        return self.entry(self.add(self.nodes[parent], name, stat.S_IFDIR | mode & ~ctx.umask))

    async def create(self, parent, name, mode, flags, ctx):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
        self.asked.append(f"{name.decode()} {mode:o} {ctx.umask:o}\n")
        node = self.add(self.nodes[parent], name, mode & ~ctx.umask)
        return pyfuse3.FileInfo(fh=node.number), self.entry(node)

    async def open(self, inode, flags, ctx):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
        direct = inode <= len(SPECIAL) + 1
        return pyfuse3.FileInfo(fh=inode, direct_io=direct, keep_cache=not direct)

    async def read(self, fh, off, size):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
        node = self.nodes[fh]
        if node is self.root.names[b"crash"]:
            raise ValueError("a bug in a handler")
        if node is self.root.names[b"slow"]:
            await trio.to_thread.run_sync(time.sleep, 0.5)
        return self.content(node)[off : off + size]

    async def write(self, fh, off, buf):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
        self.nodes[fh].data[off : off + len(buf)] = buf
        return len(buf)

    async def opendir(self, inode, ctx):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
        return inode

    async def readdir(self, fh, start_id, token):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
        for number, (name, node) in enumerate(self.nodes[fh].names.items()):
            if number < start_id:
                continue
            if not pyfuse3.readdir_reply(token, name, self.entry(node), number + 1):
                return

    async def fsync(self, fh, datasync):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
        return None

    async def statfs(self, ctx):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_namemax = 255
        return data


class Standin:
    """What daemon.run() builds instead of a union."""

    def __init__(
        self, options: MountOptions, lowers: list[Layer], upper: Layer | None, work: Work | None
    ) -> None:
        self.operations = Memory()
        self.layers = {
            "careful": [layer.careful for layer in lowers],
            "detached": [layer.detached for layer in lowers],
            "upper": upper is not None and upper.path,
            "xattrs": upper is not None and upper.features.xattrs,
            "work": work is not None and work.path,
            "whiteout": work is not None and work.whiteout,
            "umask": os.umask(0),
        }

    def set_facts(self, facts: dict[str, object]) -> None:
        self.operations.facts = facts | self.layers

    def close(self) -> None:
        pass


def main() -> int:
    """Mount; errors as the command line shows them."""
    fields = json.loads(sys.argv[1])
    for name in ("lowers", "kernel_flags"):
        if name in fields:
            fields[name] = (tuple if name == "lowers" else frozenset)(fields[name])
    try:
        return run(MountOptions(**fields), build=Standin)
    except UnionfsError as exc:
        print(f"unionfs: {exc.line()}", file=sys.stderr)
        return int(exc.code)


if __name__ == "__main__":
    sys.exit(main())
