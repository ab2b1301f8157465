"""A Ceph cluster of one monitor and one disk in memory with its S3 gateway, on this machine: a real S3 server.

Needs Debian's packages `radosgw ceph-mon ceph-osd ceph-common`, and root.
"""

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.ports import free_port

PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "monmaptool", "ceph")
KEY, SECRET = "key", "secret"
DISK_BYTES = 8 * 2**30  # memory is taken only as objects are written
START_TIMEOUT_S = 120.0
ENDS_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")

# Without keys between the processes, and with one copy of each object. By version 1 of Ceph's protocol: by version 2
# the gateway of 18.2 asks for a key even so. The disk doesn't say where it is when it starts: it ends if its request
# comes before it knows the cluster's id. What was deleted is freed after seconds: by default it is after two hours, and
# a full disk answers nothing.
CONFIG = """
[global]
fsid = {fsid}
mon host = [v1:127.0.0.1:{port}/0]
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data = {folder}/mon
mon data avail crit = 1
osd data = {folder}/osd
osd objectstore = memstore
osd class dir = {classes}
osd crush update on start = false
osd class update on start = false
memstore device bytes = {disk_bytes}
rgw data = {folder}/rgw
rgw gc obj min wait = 1
rgw gc processor period = 5
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
public addr = 127.0.0.1
cluster addr = 127.0.0.1
"""


def is_installed() -> bool:
    return os.geteuid() == 0 and all(shutil.which(program) for program in PROGRAMS) and _classes() is not None


@contextmanager
def started() -> Iterator[str]:
    """The gateway's URL. Its user has `KEY` and `SECRET`."""
    with ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="ceph-")))
        fsid, disk, port = str(uuid.uuid4()), str(uuid.uuid4()), free_port()
        config = folder / "ceph.conf"
        config.write_text(CONFIG.format(fsid=fsid, port=port, folder=folder, classes=_classes(), disk_bytes=DISK_BYTES))
        for name in ("mon", "osd", "rgw"):
            (folder / name).mkdir()

        def run(*command: str) -> None:
            done = subprocess.run(
                [*command, "-c", str(config)], capture_output=True, text=True, timeout=START_TIMEOUT_S
            )
            assert done.returncode == 0, f"{' '.join(command)} exited with {done.returncode}: {done.stderr.strip()}"

        def serve(*command: str) -> None:
            output = ends.enter_context((folder / f"{command[0]}.out").open("wb"))
            server = [*ENDS_WITH_PARENT, *command, "-f", "-c", str(config)]
            process = subprocess.Popen(server, stdout=output, stderr=output)
            ends.callback(_end, process)

        monitors = str(folder / "monmap")
        run("monmaptool", "--create", "--addv", "a", f"[v1:127.0.0.1:{port}/0]", "--fsid", fsid, monitors)
        run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monitors)
        serve("ceph-mon", "-i", "a")
        run("ceph", "osd", "new", disk)  # waits for the monitor
        run("ceph", "osd", "crush", "add", "osd.0", "1", "root=default", "host=here")
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        serve("ceph-osd", "-i", "0")
        owner = ("--uid", "runs", "--display-name", "runs", "--access-key", KEY, "--secret-key", SECRET)
        run("radosgw-admin", "user", "create", *owner)  # waits for the disk
        gateway = free_port()
        serve("radosgw", "-n", "client.admin", "--rgw-frontends", f"beast endpoint=127.0.0.1:{gateway} tcp_nodelay=1")
        yield f"http://127.0.0.1:{gateway}"


def _classes() -> Path | None:
    """Where the disk finds its methods: Debian's default is a path without the leading /usr/."""
    return next(Path("/usr/lib").glob("*/rados-classes"), None)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
