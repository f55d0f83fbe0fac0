# SPDX-License-Identifier: GPL-2.0-or-later
"""Foreign test suites run on a union: pjdfstest, fsx, unionmount-testsuite (tools/conformance)."""
