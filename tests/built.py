"""Run by `make dist`: two builds are the same to the byte, and hold what they should and nothing else."""

from __future__ import annotations

import hashlib
import sys
import tarfile
import zipfile
from pathlib import Path


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every distribution by its name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def check_wheel(path: Path) -> None:
    """Check that the wheel holds the package with its types and its templates, and no tests."""
    names = zipfile.ZipFile(path).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"external_oms"}, tops
    assert "external_oms/py.typed" in names
    assert any(name.startswith("external_oms/web/templates/") for name in names)
    assert not [name for name in names if "/test_" in name or name.endswith((".pyc", ".orig"))]


def check_sdist(path: Path) -> None:
    """Check that the sdist holds what is needed to build and to test."""
    with tarfile.open(path) as archive:
        inner = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "pyproject.toml",
        "LICENSE",
        "CHANGELOG.md",
        "Makefile",
        "src/external_oms/py.typed",
        "tests/conftest.py",
    ):
        assert name in inner, name
    assert not [name for name in inner if "node_modules" in name or "__pycache__" in name]


def main() -> None:
    """Compare two folders of distributions, and look into the first."""
    first, second = (Path(folder) for folder in sys.argv[1:])
    assert digests(first) == digests(second), (digests(first), digests(second))
    (wheel,), (sdist,) = first.glob("*.whl"), first.glob("*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    for name, digest in digests(first).items():
        sys.stdout.write(f"{digest}  {name}\n")


if __name__ == "__main__":
    main()
