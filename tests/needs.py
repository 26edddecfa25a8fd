"""Marks for tests that need optional tools: skipped with a remedy if one is missing, unless DSMOE_REQUIRE names it."""

import os
import shutil
from importlib.util import find_spec

import pytest

from dsmoe_lite.common.machine import find_nvcc
from dsmoe_lite.teaching.walls import why_not


def _needs(part: str, found: bool, remedy: str) -> pytest.MarkDecorator:
    required = part in os.environ.get("DSMOE_REQUIRE", "").split(",")  # then the test runs and fails
    return pytest.mark.skipif(not found and not required, reason=remedy)


needs_gxx = _needs("gxx", shutil.which("g++") is not None, "g++ not found: apt install g++")
needs_nvcc = _needs("nvcc", find_nvcc() is not None, "nvcc not found: pip install -e '.[nvcc]'")
needs_triton = _needs("triton", find_spec("triton") is not None, "triton not found: pip install -e '.[triton]'")
needs_pyarrow = _needs("pyarrow", find_spec("pyarrow") is not None, "pyarrow not found: pip install -e '.[parquet]'")
needs_dpkg = _needs("dpkg", shutil.which("dpkg-deb") is not None, "dpkg-deb not found: it is a part of Debian")
_WHY_NOT = why_not()
needs_bwrap = _needs("bwrap", _WHY_NOT is None, f"no isolation: {_WHY_NOT}")
needs_copydetect = _needs(
    "copydetect", find_spec("copydetect") is not None, "copydetect not found: pip install -e '.[similarity]'"
)
