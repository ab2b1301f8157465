"""A host outside a cluster's network, which reaches one port of the head and nothing else: somebody's laptop.

with Hosts(2) as hosts:
    hosts.start_ray(jobs_port=8265)
    with Laptop(hosts, 8265) as laptop:
        laptop.command("submit", "job.yaml")            # with --address of the one URL that it knows

Its only link leads to another host, a gateway, that routes nothing: a process there hands connections to that one port
on to the head. The laptop has a directory that no other host sees, and doesn't see what `hidden` names.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import psutil

from tests.support.hosts import Hosts, made, without_ray

GATEWAY, LAPTOP = "10.78.0.1", "10.78.0.2"
RELAY = """
import asyncio, sys

async def pump(reader, writer):
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()

async def serve(reader, writer):
    far_reader, far_writer = await asyncio.open_connection(sys.argv[2], int(sys.argv[3]))
    await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

async def main():
    server = await asyncio.start_server(serve, sys.argv[1], int(sys.argv[3]))
    print("listens", flush=True)
    await server.serve_forever()

asyncio.run(main())
"""
PATIENCE_S = 120.0


class Laptop:
    """Args:
    port: of the head, the only one that is reached.
    hidden: directories of the cluster that this host sees empty.
    """

    def __init__(self, hosts: Hosts, port: int, hidden: Sequence[Path] = ()) -> None:
        self.url = f"http://{GATEWAY}:{port}"
        self.directory = hosts.directory / "laptop"
        self._hosts, self._port, self._hidden = hosts, port, hidden
        self._ends = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as ends:
            gateway = self._hosts.host(self._hosts.add())
            self._host = made(ends)
            gateway.plug("inside", self._host)
            gateway.run(["ip", "address", "add", f"{GATEWAY}/24", "dev", "inside"])
            gateway.run(["ip", "link", "set", "inside", "up"])
            for command in (
                ["ip", "link", "set", "lo", "up"],
                ["ip", "address", "add", f"{LAPTOP}/24", "dev", "eth0"],
                ["ip", "link", "set", "eth0", "up"],  # no route but to the gateway
            ):
                self._host.run(command)
            token = self._hosts.token.read_text()
            self.directory.mkdir()
            for directory in (self.directory, *self._hidden):
                self._host.run(["mount", "-t", "tmpfs", "-o", "mode=700", "tmpfs", str(directory)])
            relay = [sys.executable, "-c", RELAY, GATEWAY, self._hosts.addresses[0], str(self._port)]
            process = gateway.popen(relay, stdout=subprocess.PIPE, text=True)
            ends.callback(process.kill)
            assert process.stdout is not None and process.stdout.readline() == "listens\n"
            self.write("token", token)
            self._ends = ends.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._ends.close()

    def write(self, name: str, text: str) -> None:
        """A file of its own, mode 600, in its directory."""
        script = 'umask 077; mkdir -p "$(dirname "$1")"; printf %s "$2" > "$1"'
        self._host.run(["sh", "-c", script, "sh", str(self.directory / name), text])

    def run(self, command: Sequence[str], **variables: str) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end, in the laptop's directory."""
        process = self.popen(command, variables)
        out, err = process.communicate(timeout=PATIENCE_S)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def command(self, *arguments: str, expect: int = 0, **variables: str) -> "subprocess.CompletedProcess[str]":
        """Run a command of ours with the URL; it must end with the exit code `expect`."""
        done = self.run(self.ours(*arguments), **variables)
        assert done.returncode == expect, f"{arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done

    def ours(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "orchestrator.cli.main", *arguments, "--address", self.url]

    def ray(self, *arguments: str) -> str:
        """What Ray's own command for jobs prints."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "job", *arguments, "--address", self.url]
        done = self.run(command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def popen(self, command: Sequence[str], variables: Mapping[str, str] = {}) -> "subprocess.Popen[Any]":
        env = {**without_ray(), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.directory / "token")}
        env |= {"ORCHESTRATOR_HOME": str(self.directory / "home"), "TMPDIR": str(self.directory), **variables}
        there = ["env", "--chdir", str(self.directory), *command]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return self._host.popen(there, env=env, text=True, **pipes)

    def interrupt(self, word: str) -> None:
        """Ctrl-C for the process with `word` on its command line."""
        (process,) = [p for p in self._processes(word) if p.name().startswith("python")]
        process.send_signal(2)

    def _processes(self, word: str) -> list[psutil.Process]:
        return [process for process in self._host.processes() if word in process.cmdline()]
