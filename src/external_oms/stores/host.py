"""What one host is to its processes: its boot, which of them still live, and which directories are really its own.

Source: proc(5) for `boot_id`, `/proc/<pid>/stat` and `/proc/<pid>/mountinfo`.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

__all__ = ["NETWORK_FILE_SYSTEMS", "boot_id", "is_gone", "network_file_system", "own_mountinfo", "this_process"]

NETWORK_FILE_SYSTEMS = frozenset(
    {
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "davfs",
        "fuse.ceph",
        "fuse.davfs2",
        "fuse.gcsfuse",
        "fuse.glusterfs",
        "fuse.mount.glusterfs",
        "fuse.rclone",
        "fuse.s3fs",
        "fuse.sshfs",
        "glusterfs",
        "gpfs",
        "lustre",
        "ncpfs",
        "nfs",
        "nfs4",
        "smb2",
        "smb3",
        "smbfs",
    }
)
"""File systems whose pages and locks other hosts do not share: a mapped word there is seen by one host alone."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MOUNTINFO = Path("/proc/self/mountinfo")
_OCTAL = re.compile(r"\\([0-7]{3})")


def boot_id() -> str:
    """A text that is the same for all processes of this host until it boots again.

    Linux says it. Elsewhere it is the minute of the boot, as the two clocks tell it: a wall clock that was set anew
    looks like another boot then, and costs one read per tenant.
    """
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return f"booted in minute {round((time.time() - time.monotonic()) / 60)}"


def this_process() -> str:
    """A text that names this process among all that ever ran here; empty where the host cannot tell."""
    return _name(os.getpid()) or ""


def is_gone(process: str) -> bool:
    """Whether the process that gave itself this name has surely ended.

    False where it cannot be known: another container's processes are not visible from this one.
    """
    own_space, _, _ = this_process().partition(":")
    space, _, rest = process.partition(":")
    if not process or not own_space or space != own_space:
        return False
    return _name(int(rest.partition(":")[0])) != process


def _name(pid: int) -> str | None:
    """Its space of process numbers, its number and when it started: a number alone is given again."""
    try:
        space = Path("/proc/self/ns/pid").stat().st_ino
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = stat[stat.rindex(")") + 2 :].split()
    if state in {"Z", "X"}:  # killed, and its parent has not asked yet
        return None
    return f"{space}:{pid}:{fields[18]}"


def network_file_system(directory: Path, mountinfo: str) -> str | None:
    """The type of the network file system on which a directory stands; None where it is on none that is known.

    Args:
        directory: An absolute path without symbolic links.
        mountinfo: The text of `/proc/self/mountinfo`.
    """
    found, depth = None, -1
    for line in mountinfo.splitlines():
        mount, separator, kind = line.partition(" - ")
        fields = mount.split(" ")
        if not separator or len(fields) < 5:  # noqa: PLR2004 - the fifth field is the mount point
            continue
        point = Path(_OCTAL.sub(lambda octal: chr(int(octal[1], 8)), fields[4]))
        # >=: of two mounts on one point the later one covers the earlier
        if directory.is_relative_to(point) and len(point.parts) >= depth:
            found, depth = kind.split(" ")[0], len(point.parts)
    return found if found in NETWORK_FILE_SYSTEMS else None


def own_mountinfo() -> str:
    """What is mounted where, as this process sees it; empty where the host does not say."""
    try:
        return _MOUNTINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
