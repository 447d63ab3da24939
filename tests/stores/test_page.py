"""The words that all processes of a host share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from external_oms.stores.page import ForeignPage, Page

IDENTITY = bytes(range(16))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db-generations"


def test_what_one_process_announces_another_reads(path: Path) -> None:
    page = Page.create(path, IDENTITY)
    script = (
        "import sys; from pathlib import Path; from external_oms.stores.page import Page\n"
        "Page.open(Path(sys.argv[1]), bytes(range(16))).announce('acme', 2**60 + 1)"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], timeout=30, check=True)
    assert page.word("acme") == page.words[Page.slot("acme")] == 2**60 + 1


def test_a_touched_word_differs_from_every_word_before(path: Path) -> None:
    page = Page.create(path, IDENTITY)
    seen = {page.word("acme")}
    for _ in range(1000):
        page.touch("acme")
        seen.add(page.word("acme"))
    assert len(seen) == 1001
    assert min(seen - {0}) >= 2**62


def test_touching_all_changes_words_that_were_never_written(path: Path) -> None:
    page = Page.create(path, IDENTITY)
    page.announce("acme", 7)
    page.touch_all()
    assert page.word("acme") not in {0, 7}
    assert page.word("other") != 0
    Page.open(path, IDENTITY)  # the header is no word


def test_no_slot_lies_in_the_header() -> None:
    slots = {Page.slot(f"tenant-{number}") for number in range(20_000)}
    assert min(slots) >= 8
    assert max(slots) == 8191


def test_its_file_is_the_users_alone_and_its_blocks_are_allocated(path: Path) -> None:
    before = os.umask(0)
    try:
        Page.create(path, IDENTITY)
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
def test_a_file_that_is_no_page_is_told(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ForeignPage):
        Page.open(path, IDENTITY)


def test_the_page_of_another_database_is_told(path: Path) -> None:
    Page.create(path, bytes(16))
    with pytest.raises(ForeignPage):
        Page.open(path, IDENTITY)


def test_a_symbolic_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    Page.create(tmp_path / "elsewhere", IDENTITY)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        Page.open(path, IDENTITY)


def test_a_draft_that_a_killed_process_left_behind_does_no_harm(path: Path) -> None:
    path.with_name(f"{path.name}.new").write_bytes(b"half")
    Page.create(path, IDENTITY)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_page_that_cannot_be_written_leaves_no_draft(path: Path) -> None:
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        Page.create(path, IDENTITY)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_it_knows_when_another_file_has_its_place(path: Path) -> None:
    page = Page.create(path, IDENTITY)
    assert not page.moved(path)
    path.rename(path.with_name("aside"))
    assert page.moved(path)
    Page.create(path, IDENTITY)
    assert page.moved(path)
    assert not Page.private().moved(path)
