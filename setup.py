# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds unionfs._native. Everything else about the package stands in pyproject.toml."""

import os
from pathlib import Path

from setuptools import Extension, setup

# UNIONFS_SANITIZE=address,undefined builds the module for tools/test --sanitize.
SANITIZE = os.environ.get("UNIONFS_SANITIZE", "")
FLAGS = [
    "-std=gnu17",
    "-O2",
    "-g",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wconversion",
    "-Wsign-compare",
    "-Wstrict-prototypes",
    # CPython's own macros convert between signed and unsigned sizes.
    "-Wno-sign-conversion",
]
if os.environ.get("UNIONFS_WERROR"):
    FLAGS.append("-Werror")
LINK: list[str] = ["-pthread"]
if SANITIZE:
    FLAGS += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-O1"]
    LINK += [f"-fsanitize={SANITIZE}"]

setup(
    ext_modules=[
        Extension(
            "unionfs._native",
            sources=sorted(str(p) for p in Path("cext").glob("*.c")),
            depends=sorted(str(p) for p in Path("cext").glob("*.h")),
            extra_compile_args=FLAGS,
            extra_link_args=LINK,
            define_macros=[("_GNU_SOURCE", "1")],
        )
    ]
)
