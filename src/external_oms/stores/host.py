"""The boot of this host, the identity of its processes, and the file systems that it shares with other hosts.

Source: proc(5) for `boot_id`, `/proc/<pid>/stat` and `/proc/<pid>/mountinfo`.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

__all__ = ["NETWORK_FILE_SYSTEMS", "boot_id", "is_gone", "network_file_system", "own_mountinfo", "process_identity"]

_NETWORK = """
9p afs beegfs ceph cifs davfs fuse.ceph fuse.davfs2 fuse.gcsfuse fuse.glusterfs fuse.mount.glusterfs fuse.rclone
fuse.s3fs fuse.sshfs glusterfs gpfs lustre ncpfs nfs nfs4 smb2 smb3 smbfs
"""

NETWORK_FILE_SYSTEMS = frozenset(_NETWORK.split())
"""File systems whose memory and locks are not shared between hosts: only one host sees a mapped word change there."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MOUNTINFO = Path("/proc/self/mountinfo")
_OCTAL = re.compile(r"\\([0-7]{3})")
_IDENTITY = re.compile(r"([0-9]{1,20}):([0-9]{1,10}):[0-9]{1,20}")


def boot_id() -> str:
    """Return a text that is the same for all processes of this host until it boots again.

    Linux provides it. Elsewhere it is the minute of the boot, computed from the two clocks: where the wall clock was
    set, that looks like another boot, and costs one read per tenant.
    """
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return f"booted in minute {round((time.time() - time.monotonic()) / 60)}"


def process_identity() -> str:
    """Return a text that names this process among all that ever ran since the boot; empty where the host has none."""
    return _identity(os.getpid()) or ""


def is_gone(identity: str) -> bool:
    """Return whether the process with this identity is known to have ended.

    False where that cannot be told: the processes of another container are not visible from this one.
    """
    given = _IDENTITY.fullmatch(identity)
    own = _IDENTITY.fullmatch(process_identity())
    if given is None or own is None or given[1] != own[1]:
        return False
    return _identity(int(given[2])) != identity


def _identity(pid: int) -> str | None:
    """Return PID namespace, PID and start time of a process: a PID alone is used again. None where it has ended."""
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = stat[stat.rindex(")") + 2 :].split()
    if state in {"Z", "X"}:  # it has ended, and its parent has not yet waited for it
        return None
    return f"{namespace}:{pid}:{fields[18]}"


def network_file_system(directory: Path, mountinfo: str) -> str | None:
    """Return the type of the network file system that holds a directory; None where no known one does.

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
        # >=: of two mounts at one point the later one covers the earlier
        if directory.is_relative_to(point) and len(point.parts) >= depth:
            found, depth = kind.split(" ")[0], len(point.parts)
    return found if found in NETWORK_FILE_SYSTEMS else None


def own_mountinfo() -> str:
    """Return the mounts that this process sees, in the form of `mountinfo`; empty where the host does not list them."""
    try:
        return _MOUNTINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
