"""The version table: one word per storage key, in memory that all processes of a host share.

A process that has loaded an entry remembers the word that it saw before it loaded. While the word is the same, the
entry is the same; a word that differs means *load again*. To look costs 40 ns and no system call.

A word says nothing about the change, so nothing depends on the order in which words are written. Two rules suffice:

- A word is written after the change that it announces can be loaded, and no value is ever written twice: versions are
  counted by the database, and every other value is drawn from 2^61 numbers above them.
- A reader remembers the word that it saw *before* it loaded.

Example: two processes commit versions 7 and 8 and write their words late and in the wrong order, 8 and then 7. A reader
that saw 8 sees 7, which differs, and loads once more than necessary. A reader that sees 7 first loads after both were
committed. No reader can have remembered 7 before it was written, and it is not written again; so no change is missed.

For the same reason two keys may share a word: a change of either makes the readers of both load.

A process that has the table mapped dies of SIGBUS where another one cuts the file short. Nothing can prevent that;
the mode of the file (0600) and the checks of `sqlite_file` keep other users from doing it.
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
import zlib
from contextlib import suppress
from pathlib import Path

__all__ = ["PageMismatch", "VersionTable"]

_WORD_BYTES = 8
_HEADER_WORDS = 8
_WORDS = 8192
"""64 KiB: with a hundred tenants every second host has two that share a word, which costs them some loads."""

_MAGIC = b"extomsGP"
_FORMAT = 1
_HEADER = struct.Struct("=8sQ16s")
_SIZE = _WORDS * _WORD_BYTES
_DRAWN = 1 << 62
"""The bit that tells drawn values from versions, which stay below it."""


class PageMismatch(Exception):
    """The file is not the version table of this database: another's, damaged, or made by another kind of machine."""


class VersionTable:
    """The mapped words; made by `anonymous`, `create` or `open`.

    The blocks of the file are allocated when it is made, so that writing a word never meets a full disk, which would be
    a signal rather than an error.

    Attributes:
        words: All words. Reads and writes are native and of 8 bytes, so no reader sees half of one.
    """

    __slots__ = ("_header", "_inode", "_mapped", "words")

    def __init__(self, mapped: mmap.mmap, inode: tuple[int, int] | None) -> None:
        self.words = memoryview(mapped).cast("Q")
        self._mapped = mapped
        self._header = mapped[: _HEADER.size]
        self._inode = inode

    @classmethod
    def anonymous(cls) -> VersionTable:
        """Return a table without a file, shared only with the children that this process forks."""
        return cls(mmap.mmap(-1, _SIZE), None)

    @classmethod
    def create(cls, path: Path, identity: bytes) -> VersionTable:
        """Make a new table in the place of any other, in one step, so that no process finds half a table.

        Args:
            path: Where.
            identity: 16 bytes, the same as in the database.

        Raises:
            OSError: The file cannot be written.
        """
        draft = path.with_name(f"{path.name}.new")
        with suppress(FileNotFoundError):
            draft.unlink()  # of a process that was killed here
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_HEADER.pack(_MAGIC, _FORMAT, identity).ljust(_SIZE, b"\0"))
            draft.replace(path)
        except OSError:
            draft.unlink(missing_ok=True)
            raise
        return cls.open(path, identity)

    @classmethod
    def open(cls, path: Path, identity: bytes) -> VersionTable:
        """Map the table that belongs to the database of this identity.

        Raises:
            FileNotFoundError: There is none.
            PageMismatch: The file is not that table.
            OSError: The file cannot be opened for reading and writing.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            if found.st_size != _SIZE:
                raise PageMismatch(f"it has {found.st_size} bytes instead of {_SIZE}")
            mapped = mmap.mmap(descriptor, _SIZE)
        finally:
            os.close(descriptor)
        if mapped[: _HEADER.size] != _HEADER.pack(_MAGIC, _FORMAT, identity):
            mapped.close()
            raise PageMismatch("its header is not that of the version table of this database")
        return cls(mapped, (found.st_dev, found.st_ino))

    @staticmethod
    def index(key: str) -> int:
        """Return the index of the word of a key, which every process can compute alone."""
        return _HEADER_WORDS + zlib.crc32(key.encode("utf-8", "surrogatepass")) % (_WORDS - _HEADER_WORDS)

    def publish(self, key: str, version: int) -> None:
        """Announce that this version can be loaded; once per version, by the process that committed it."""
        self.words[self.index(key)] = version

    def invalidate(self, index: int) -> None:
        """Make every process load the entries of this word again."""
        # not random.random: a program that seeds it would repeat values
        self.words[index] = _DRAWN | secrets.randbits(61)

    def invalidate_all(self) -> None:
        """Make every process load every entry again."""
        drawn = _DRAWN | secrets.randbits(61)
        for index in range(_HEADER_WORDS, _WORDS):
            self.words[index] = drawn

    def is_in_place(self, path: Path) -> bool:
        """Return whether the table is the file at this path, whole and with its header."""
        try:
            found = path.stat()
        except OSError:
            return False
        return (
            (found.st_dev, found.st_ino) == self._inode
            and found.st_size == _SIZE  # before the look at the header, which would be fatal in a shorter file
            and self._mapped[: _HEADER.size] == self._header
        )
