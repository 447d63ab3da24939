"""The version table that all processes of a host share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from external_oms.stores.versions import PageMismatch, VersionTable

IDENTITY = bytes(range(16))
INDEX = VersionTable.index("acme")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db-generations"


def test_another_process_reads_what_one_publishes(path: Path) -> None:
    table = VersionTable.create(path, IDENTITY)
    script = (
        "import sys; from pathlib import Path; from external_oms.stores.versions import VersionTable\n"
        "VersionTable.open(Path(sys.argv[1]), bytes(range(16))).publish('acme', 2**60 + 1)"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], timeout=30, check=True)
    assert table.words[INDEX] == 2**60 + 1


def test_a_forked_child_and_its_parent_share_an_anonymous_table() -> None:
    table = VersionTable.anonymous()
    pid = os.fork()
    if pid == 0:
        table.publish("acme", 7)
        os._exit(0)
    os.waitpid(pid, 0)
    assert table.words[INDEX] == 7


def test_an_invalidated_word_differs_from_every_word_before(path: Path) -> None:
    table = VersionTable.create(path, IDENTITY)
    seen = {table.words[INDEX]}
    for _ in range(1000):
        table.invalidate(INDEX)
        seen.add(table.words[INDEX])
    assert len(seen) == 1001
    assert min(seen - {0}) >= 2**62, "no version gets there"


def test_to_invalidate_all_changes_words_that_were_never_written(path: Path) -> None:
    table = VersionTable.create(path, IDENTITY)
    table.publish("acme", 7)
    table.invalidate_all()
    assert table.words[INDEX] not in {0, 7}
    assert table.words[VersionTable.index("other")] != 0
    assert table.is_in_place(path), "the header is no word"


def test_no_word_lies_in_the_header() -> None:
    indexes = {VersionTable.index(f"tenant-{number}@https://example.com") for number in range(20_000)}
    assert min(indexes) >= 8
    assert 8100 < max(indexes) <= 8191


def test_the_file_is_the_users_alone_and_its_blocks_are_allocated(path: Path) -> None:
    before = os.umask(0)
    try:
        VersionTable.create(path, IDENTITY)
    finally:
        os.umask(before)
    found = path.stat()
    assert found.st_mode & 0o777 == 0o600
    assert found.st_blocks * 512 >= found.st_size == 65_536
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "content",
    [b"", b"x" * 65_536, b"extomsGP".ljust(65_536, b"\0"), b"extomsGP"],
    ids=["empty", "foreign", "of another format", "cut short"],
)
def test_a_file_that_is_no_version_table_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(PageMismatch):
        VersionTable.open(path, IDENTITY)


def test_the_table_of_another_database_is_refused(path: Path) -> None:
    VersionTable.create(path, bytes(16))
    with pytest.raises(PageMismatch):
        VersionTable.open(path, IDENTITY)


def test_a_symbolic_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    VersionTable.create(tmp_path / "elsewhere", IDENTITY)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        VersionTable.open(path, IDENTITY)


def test_a_draft_that_a_killed_process_left_behind_does_no_harm(path: Path) -> None:
    path.with_name(f"{path.name}.new").write_bytes(b"half")
    VersionTable.create(path, IDENTITY)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_table_that_cannot_be_written_leaves_no_draft(path: Path) -> None:
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        VersionTable.create(path, IDENTITY)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def removed(path: Path) -> None:
    path.unlink()


def replaced(path: Path) -> None:
    VersionTable.create(path, IDENTITY)


def cut_short(path: Path) -> None:
    os.truncate(path, 100)


def overwritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"x" * 64)


@pytest.mark.parametrize("damage", [removed, replaced, cut_short, overwritten])
def test_a_table_that_was_removed_replaced_or_damaged_is_not_in_place(
    path: Path, damage: Callable[[Path], None]
) -> None:
    table = VersionTable.create(path, IDENTITY)
    table.publish("acme", 7)
    assert table.is_in_place(path)
    damage(path)
    assert not table.is_in_place(path)
