# SPDX-License-Identifier: GPL-2.0-or-later
"""Directory trees as text: what git does not keep (owners, xattrs, devices, hard links) is kept.

A sample is one JSON file: words about it, the entries of its layers (one a line), and the tree
that the union of them must show (one entry a line). Names are file system bytes as Python decodes
them (surrogateescape). Called by make.py, which writes samples, and tests/test_formats.py.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import stat
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.rig.snapshot import Entry, Tree

Record = dict[str, Any]
HERE = Path(__file__).parent
_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}
_TYPES = {name: kind for kind, name in _KINDS.items()}


def encode(data: bytes) -> str:
    """Bytes as text that can be read where they can: `text:`, `hex:`, or packed as `zlib:`."""
    if len(data) <= 400:
        if all(32 <= byte < 127 or byte == 10 for byte in data):
            return "text:" + data.decode()
        return "hex:" + data.hex()
    return "zlib:" + base64.b64encode(zlib.compress(data, 9)).decode()


def decode(text: str) -> bytes:
    form, _, rest = text.partition(":")
    if form == "text":
        return rest.encode()
    if form == "hex":
        return bytes.fromhex(rest)
    return zlib.decompress(base64.b64decode(rest))


# ---- packing ----


def pack(root: Path, parts: Iterable[str]) -> list[Record]:
    """The trees root/PART; names of one inode after the first are links to it, also across."""
    seen: dict[tuple[int, int], str] = {}
    records: list[Record] = []
    for part in parts:
        _pack(os.fsencode(root), os.fsencode(part), seen, records)
    return records


def _pack(
    root: bytes, name: bytes, seen: dict[tuple[int, int], str], records: list[Record]
) -> None:
    path = os.path.join(root, name)
    st = os.lstat(path)
    shown = os.fsdecode(name)
    kind = stat.S_IFMT(st.st_mode)
    if kind != stat.S_IFDIR and (first := seen.setdefault((st.st_dev, st.st_ino), shown)) != shown:
        records.append({"path": shown, "link": first})
        return
    record: Record = {
        "path": shown,
        "kind": _KINDS[kind],
        "mode": f"{stat.S_IMODE(st.st_mode):04o}",
        "owner": f"{st.st_uid}:{st.st_gid}",
        "mtime": st.st_mtime_ns,
    }
    if kind == stat.S_IFREG:
        record["data"] = encode(Path(os.fsdecode(path)).read_bytes())
    elif kind == stat.S_IFLNK:
        record["target"] = os.fsdecode(os.readlink(path))
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        record["rdev"] = f"{os.major(st.st_rdev)}:{os.minor(st.st_rdev)}"
    if found := _xattrs(path):
        record["xattrs"] = found
    records.append(record)
    if kind == stat.S_IFDIR:
        for child in sorted(os.listdir(path)):
            _pack(root, os.path.join(name, child), seen, records)


def _xattrs(path: bytes) -> dict[str, str]:
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as exc:
        if exc.errno != errno.ENOTSUP:
            raise
        return {}
    return {name: encode(os.getxattr(path, name, follow_symlinks=False)) for name in sorted(names)}


# ---- unpacking ----


def unpack(records: Iterable[Record], root: Path) -> None:
    """The trees again. An ordinary user becomes the owner of everything."""
    records = list(records)
    for record in records:
        _make(root, record)
    # Modes and times last, children first: making an entry needs the one and changes the other.
    for record in reversed(records):
        if "link" not in record:
            _dress(root, record)


def _make(root: Path, record: Record) -> None:
    path = os.fsencode(root / record["path"])
    if "link" in record:
        os.link(os.fsencode(root / record["link"]), path, follow_symlinks=False)
        return
    kind = _TYPES[record["kind"]]
    if kind == stat.S_IFREG:
        with open(path, "xb") as file:
            file.write(decode(record["data"]))
    elif kind == stat.S_IFDIR:
        os.mkdir(path)
    elif kind == stat.S_IFLNK:
        os.symlink(os.fsencode(record["target"]), path)
    else:
        major, minor = map(int, record.get("rdev", "0:0").split(":"))
        os.mknod(path, kind | 0o600, os.makedev(major, minor))


def _dress(root: Path, record: Record) -> None:
    path = os.fsencode(root / record["path"])
    if os.geteuid() == 0:
        uid, gid = map(int, record["owner"].split(":"))
        os.chown(path, uid, gid, follow_symlinks=False)
    for name, value in record.get("xattrs", {}).items():
        os.setxattr(path, name, decode(value), follow_symlinks=False)
    if record["kind"] != "symlink":
        os.chmod(path, int(record["mode"], 8))
    os.utime(path, ns=(record["mtime"], record["mtime"]), follow_symlinks=False)


# ---- the expected tree ----


def tree_to_records(tree: Tree) -> list[Record]:
    return [_shown(name, entry) for name, entry in sorted(tree.items())]


def _shown(name: bytes, entry: Entry) -> Record:
    record: Record = {"path": os.fsdecode(name)}
    record["kind"] = _KINDS[entry.kind]
    record["mode"] = f"{entry.mode:04o}"
    record["owner"] = f"{entry.uid}:{entry.gid}"
    record["mtime"] = entry.mtime
    if entry.kind != stat.S_IFDIR:
        record["links"] = entry.links
        record["size"] = entry.size
    if entry.group != name:
        record["same_as"] = os.fsdecode(entry.group)
    if entry.kind == stat.S_IFREG:
        record["content"] = entry.content
    if entry.target:
        record["target"] = os.fsdecode(entry.target)
    if entry.rdev:
        record["rdev"] = f"{os.major(entry.rdev)}:{os.minor(entry.rdev)}"
    if entry.xattrs:
        record["xattrs"] = {key: encode(value) for key, value in entry.xattrs}
    return record


def records_to_tree(records: Iterable[Record]) -> Tree:
    return {os.fsencode(record["path"]): _entry(record) for record in records}


def _entry(record: Record) -> Entry:
    uid, gid = map(int, record["owner"].split(":"))
    major, minor = map(int, record.get("rdev", "0:0").split(":"))
    return Entry(
        kind=_TYPES[record["kind"]],
        mode=int(record["mode"], 8),
        uid=uid,
        gid=gid,
        size=record.get("size", 0),
        rdev=os.makedev(major, minor),
        mtime=record["mtime"],
        links=record.get("links", 0),
        target=os.fsencode(record.get("target", "")),
        content=record.get("content", ""),
        xattrs=tuple((key, decode(value)) for key, value in record.get("xattrs", {}).items()),
        group=os.fsencode(str(record.get("same_as", record["path"]))),
        ino=0,
    )


# ---- sample files ----


def write(path: Path, sample: Mapping[str, Any]) -> None:
    """JSON, with each entry on a line of its own."""
    lines = []
    for key, value in sample.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n  ".join(json.dumps(row) for row in value)
            lines.append(f"{json.dumps(key)}: [\n  {rows}\n]")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def load(name: str) -> dict[str, Any]:
    sample: dict[str, Any] = json.loads((HERE / f"{name}.json").read_text())
    return sample


def names() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.json"))
