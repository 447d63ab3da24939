"""The boot, the identity of processes, and network file systems."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from external_oms.stores.host import boot_id, is_gone, network_file_system, own_mountinfo, process_identity

MOUNTS = r"""
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:25 / /mnt/share rw,relatime shared:7 - nfs4 server:/export rw,vers=4.2
31 30 254:1 / /mnt/share/local rw - xfs /dev/vdb rw
32 22 0:26 / /mnt/with\040space rw - cifs //server/share rw
33 22 0:27 / /mnt/hidden rw - fuse.sshfs me@server: rw
34 33 0:28 / /mnt/hidden rw - tmpfs tmpfs rw
a line of no form
"""


@pytest.mark.parametrize(
    ("directory", "kind"),
    [
        ("/", None),
        ("/var/lib/external-oms", None),
        ("/mnt/share", "nfs4"),
        ("/mnt/share/deep/below", "nfs4"),
        ("/mnt/shared", None),
        ("/mnt/share/local/state", None),
        ("/mnt/with space/state", "cifs"),
        ("/mnt/hidden/state", None),
    ],
)
def test_a_network_file_system_is_recognised_by_the_mount_that_lies_on_top(directory: str, kind: str | None) -> None:
    assert network_file_system(Path(directory), MOUNTS) == kind


def test_the_mounts_of_the_host_can_be_read(tmp_path: Path) -> None:
    assert " - " in own_mountinfo()
    assert network_file_system(tmp_path, own_mountinfo()) is None


def test_a_host_that_lists_no_mounts_has_none_that_are_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("external_oms.stores.host._MOUNTINFO", tmp_path / "absent")
    assert network_file_system(tmp_path, own_mountinfo()) is None


def test_the_boot_is_the_same_for_all_processes() -> None:
    script = "from external_oms.stores.host import boot_id; print(boot_id())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == boot_id() != ""


def test_where_the_host_names_no_boot_its_minute_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("external_oms.stores.host._BOOT_ID", tmp_path / "absent")
    assert boot_id() == boot_id()
    assert boot_id().startswith("booted in minute ")


def test_a_process_is_gone_once_it_has_ended_even_before_its_parent_has_waited_for_it() -> None:
    script = "from external_oms.stores.host import process_identity; print(process_identity(), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        identity = child.stdout.readline().strip()
        assert not is_gone(identity)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert is_gone(identity)
        child.wait()
        assert is_gone(identity)
    assert not is_gone(process_identity())


def test_a_pid_that_is_used_again_is_another_process() -> None:
    namespace, pid, started = process_identity().split(":")
    assert is_gone(f"{namespace}:{pid}:{int(started) - 1}")


@pytest.mark.parametrize("identity", ["", "1:1:1", "x", "a:b:c", "1:x:1", "1" * 5000, "4026531836:1\x00:1"])
def test_of_a_process_that_cannot_be_seen_nothing_is_concluded(identity: str) -> None:
    assert not is_gone(identity)


def test_garbage_in_the_namespace_of_this_process_is_no_process() -> None:
    namespace = process_identity().partition(":")[0]
    for garbage in ("x:1", "1:x", ":", "1", "99999999999:1", "-1:1"):
        assert not is_gone(f"{namespace}:{garbage}")
    assert is_gone(f"{namespace}:999999999:1")
