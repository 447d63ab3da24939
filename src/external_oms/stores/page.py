"""One word per tenant in memory that all processes of a host share: a word that differs means *load again*.

A word says nothing of what changed, so nothing depends on the order in which words are written:

- A word is written after the change it stands for can be loaded, and no value is ever written twice: revisions are
  counted by the database, and every other value is drawn from 2^62.
- A reader remembers the word that it saw *before* it loaded.

Two processes commit revisions 7 and 8 and write their words late and in the wrong order, 8 and then 7. Whoever saw 8
sees 7, which differs, and loads once in vain. Whoever sees 7 first loads after both were committed. Nobody can have
remembered 7 before it was written, and it is not written again; so no change goes unseen.

That is also why two tenants may share a word: each of them then loads in vain when the other changes.
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
import zlib
from contextlib import suppress
from pathlib import Path

__all__ = ["ForeignPage", "Page"]

_WORD_BYTES = 8
_HEADER_WORDS = 8
_WORDS = 8192
"""64 KiB: with a hundred tenants every second host has two that share a word, which costs them a load in vain."""

_MAGIC = b"extomsGP"
_FORMAT = 1
_HEADER = struct.Struct("=8sQ16s")
_SIZE = _WORDS * _WORD_BYTES
_DRAWN = 1 << 62
"""The bit that keeps values that were drawn apart from revisions, which are counted from below 2^61."""


class ForeignPage(Exception):
    """The file is not the page of this database: another's, damaged, or made by a machine of another kind."""


class Page:
    """The words, mapped.

    Made by `private`, `create` or `open`. Blocks of the file are allocated when it is made, so that writing a word
    never meets a full disk (there it would be a signal, not an error); who cuts the file short while processes have
    it mapped kills them.

    Attributes:
        words: All words, by native 8-byte reads and writes, which no reader ever sees half done.
    """

    __slots__ = ("_file", "words")

    def __init__(self, mapped: mmap.mmap, file: tuple[int, int] | None) -> None:
        self.words = memoryview(mapped).cast("Q")
        self._file = file

    @classmethod
    def private(cls) -> Page:
        """A page of this process (and the children it forks) alone."""
        return cls(mmap.mmap(-1, _SIZE), None)

    @classmethod
    def create(cls, path: Path, identity: bytes) -> Page:
        """A new page in the place of whatever is there; all at once, so that nobody finds half a page.

        Args:
            path: Where.
            identity: 16 bytes, the same as in the database.

        Raises:
            OSError: It cannot be written.
        """
        draft = path.with_name(f"{path.name}.new")
        with suppress(FileNotFoundError):
            draft.unlink()
        opened = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(opened, "wb") as file:
                file.write(_HEADER.pack(_MAGIC, _FORMAT, identity).ljust(_SIZE, b"\0"))
            draft.replace(path)
        except OSError:
            draft.unlink(missing_ok=True)
            raise
        return cls.open(path, identity)

    @classmethod
    def open(cls, path: Path, identity: bytes) -> Page:
        """The page that belongs to the database of this identity.

        Raises:
            FileNotFoundError: There is none.
            ForeignPage: What is there is not it.
            OSError: It cannot be opened for reading and writing.
        """
        opened = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            found = os.fstat(opened)
            if found.st_size != _SIZE:
                raise ForeignPage(f"{found.st_size} bytes where a page has {_SIZE}")
            mapped = mmap.mmap(opened, _SIZE)
        finally:
            os.close(opened)
        if mapped[: _HEADER.size] != _HEADER.pack(_MAGIC, _FORMAT, identity):
            mapped.close()
            raise ForeignPage("its header is not that of this database's page")
        return cls(mapped, (found.st_dev, found.st_ino))

    @staticmethod
    def slot(tenant: str) -> int:
        """Where the tenant's word stands; the same in every process without asking anybody."""
        return _HEADER_WORDS + zlib.crc32(tenant.encode()) % (_WORDS - _HEADER_WORDS)

    def word(self, tenant: str) -> int:
        """The tenant's word."""
        return self.words[self.slot(tenant)]

    def announce(self, tenant: str, revision: int) -> None:
        """Say that this revision can be loaded; once per revision, by whoever committed it."""
        self.words[self.slot(tenant)] = revision

    def touch(self, tenant: str) -> None:
        """Have everybody load again."""
        self.words[self.slot(tenant)] = _DRAWN | secrets.randbits(
            61
        )  # not random.random: whoever seeds that repeats it

    def touch_all(self) -> None:
        """Have everybody load every tenant again."""
        drawn = _DRAWN | secrets.randbits(61)
        for slot in range(_HEADER_WORDS, _WORDS):
            self.words[slot] = drawn

    def moved(self, path: Path) -> bool:
        """Whether the file at the path is another one than the one mapped."""
        if self._file is None:
            return False
        try:
            found = path.stat()
        except OSError:
            return True
        return (found.st_dev, found.st_ino) != self._file
