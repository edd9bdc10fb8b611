"""A SuperLink and SuperNodes of Flower as processes of this machine, for `examples/deploy_demo.py` and the tests.

Each process is stopped by its id. Nothing is sent to anyone else: Flower's telemetry and its look for updates are off.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

# What a SuperNode logs before it ends, or does nothing more.
GAVE_UP = (b"SuperNode terminated gracefully", b"Giving up reconnection", b"SSL/TLS handshake error")
BIN = Path(sys.executable).parent  # of an environment with pilot-jax[deploy]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Wire:
    """Passes TCP connections on to a port of this machine, and keeps every byte of both directions."""

    def __init__(self, to: int) -> None:
        self.to, self.connections = to, list[tuple[bytearray, bytearray]]()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
                far = socket.create_connection(("127.0.0.1", self.to))
            except OSError:
                if self._server.fileno() < 0:
                    return
                near.close()  # nobody listens there now
                continue
            self.connections.append((bytearray(), bytearray()))
            for one, other, kept in ((near, far, self.connections[-1][0]), (far, near, self.connections[-1][1])):
                threading.Thread(target=self._pass, args=(one, other, kept), daemon=True).start()

    @staticmethod
    def _pass(one: socket.socket, other: socket.socket, kept: bytearray) -> None:
        with contextlib.suppress(OSError):
            while block := one.recv(65536):
                kept += block
                other.sendall(block)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def objects(self) -> tuple[list[bytes], list[bytes]]:
        """Returns the bodies of all HTTP messages that carry a part of a parcel: (uploads, downloads)."""
        up, down = [], []
        for sent, received in self.connections:
            for (head, body), (_, answer) in zip(http_messages(bytes(sent)), http_messages(bytes(received)),
                                                 strict=False):
                if b"/push-object" in head:
                    up.append(body)
                if b"/pull-object" in head:
                    down.append(answer)
        return up, down

    def close(self) -> None:
        self._server.close()


def http_messages(stream: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields (head, body) of the HTTP/1.1 messages of one direction of a connection."""
    at = 0
    while (end := stream.find(b"\r\n\r\n", at)) >= 0:
        head = stream[at:end]
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        size = int(length[1]) if length else 0
        yield head, stream[end + 4:end + 4 + size]
        at = end + 4 + size


class Network:
    """The processes of one deployment in one folder.

    Args:
        secure: whether connections use TLS and nodes are authenticated, with certificates and keys that are made here.
        wire: whether SuperNodes connect through a `Wire`.
        database: the option of SuperLink; None: it keeps everything in memory, and forgets it when it ends.

    Once `stopped` is set, no network starts a process again, and what waits for one raises an `InterruptedError`.
    """

    stopped = threading.Event()

    def __init__(self, folder: Path, app: Path, *, secure: bool = False, wire: bool = False,
                 database: str | None = "superlink.db") -> None:
        self.folder, self.app, self.secure, self.database = folder, app, secure, database
        self.port = free_port()
        self.wire = Wire(self.port) if wire else None
        self.processes: dict[str, subprocess.Popen] = {}
        self.begins: dict[str, int] = {}  # where the log of a process begins, in bytes
        self.commands: dict[str, list[str]] = {}
        (folder / "flwr").mkdir(parents=True, exist_ok=True)
        tls = f'root-certificates = "{folder / "ca.crt"}"' if secure else "insecure = true"
        (folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n{tls}\n')
        if secure:
            make_certificate(folder)

    def environment(self, home: str) -> dict[str, str]:
        mine = self.folder / home
        mine.mkdir(exist_ok=True)
        return os.environ | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "FLWR_HOME": str(mine), "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2", "JAX_PLATFORMS": "cpu"}

    def start(self, name: str, command: list[str]) -> subprocess.Popen:
        log = (self.folder / f"{name}.log").open("ab")
        self.commands[name], self.begins[name] = command, log.tell()
        self.processes[name] = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]], stdout=log, stderr=log, cwd=self.folder,
            env=self.environment("flwr" if name == "server" else f"flwr-{name}"))
        log.close()
        return self.processes[name]

    def start_server(self) -> None:
        options = (["--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.crt", "--ssl-keyfile", "server.key",
                    "--enable-supernode-auth"] if self.secure else ["--insecure"])
        self.start("server", ["flower-superlink", "--host", "127.0.0.1", "--port", str(self.port),
                              *(() if self.database is None else ("--database", self.database)),
                              "--disable-runtime-dependency-installation", *options])
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.1)
        raise TimeoutError(f"no SuperLink after a minute; see {self.folder / 'server.log'}")

    def start_node(self, client: str, data: Path | None = None, key: str | None = None) -> None:
        """Starts a client's SuperNode. `key`: the name of its private key; by default the client's, if `secure`."""
        options = (["--root-certificates", "ca.crt", *([] if key == "" else [
            "--auth-supernode-private-key", key or client])] if self.secure else ["--insecure"])
        config = f'client="{client}" state="{self.folder / "nodes"}"' + (
            "" if data is None else f' data.path="{data}"')
        self.start(client, ["flower-supernode", "--superlink", f"127.0.0.1:{(self.wire or self).port}", "--host",
                            "127.0.0.1", "--port", str(free_port()), "--node-config", config, *options])

    def flwr(self, *arguments: str) -> str:
        done = subprocess.run([str(BIN / "flwr"), *arguments], env=self.environment("flwr"), cwd=self.folder,
                              capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(f"flwr {' '.join(arguments)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.stdout

    def register(self, client: str) -> None:
        self.flwr("supernode", "register", str(self.folder / f"{client}.pub"))

    def run(self, **settings: float | str) -> str:
        """Starts a run of the app and returns its id."""
        values = {"out": str(self.folder / "run"), "poll": 0.3, **settings}
        text = " ".join(f"{k.replace('_', '-')}={json.dumps(v)}" for k, v in values.items())
        return re.search(r"Successfully started run (\d+)", self.flwr(
            "run", str(self.app), "--run-config", text))[1]  # type: ignore[index]

    def status(self, run: str) -> str:
        """Returns a run's status, such as "running" or "finished:completed"."""
        table = json.loads(self.flwr("list", "--run-id", run, "--format", "json"))
        return table["runs"][0]["status"]

    def wait(self, run: str, seconds: float) -> str:
        """Waits for the end of a run and returns its status; raises a `TimeoutError` after a while."""
        end, ask = time.monotonic() + seconds, time.monotonic() + 60  # asking takes seconds
        while time.monotonic() < end:
            self.revive()
            if (self.folder / "run" / "summary.json").exists() or time.monotonic() > ask:
                if (status := self.status(run)).startswith("finished"):
                    return status
                ask = time.monotonic() + 60
            time.sleep(0.5)
        raise TimeoutError(f"the run has not ended after {seconds} seconds; see the logs in {self.folder}")

    def kill(self, name: str) -> None:
        """Ends a process and all that it has started with SIGKILL, as when its machine stops."""
        below = [int(folder.name) for folder in self.tree(name)]
        process = self.processes.pop(name)
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()

    def stop(self, name: str) -> None:
        """Ends one process by its id, and waits until it has ended."""
        process = self.processes.pop(name)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def revive(self) -> list[str]:
        """Starts processes again that have ended by themselves, as a supervisor does, and returns their names.

        A SuperNode gives up at some errors of its connection; with TLS, also when SuperLink is killed. Its process can
        stay behind after that (seen with flwr 1.42), so what it has logged counts too.
        """
        if self.stopped.is_set():
            raise InterruptedError("stopped")
        ended = [name for name, process in self.processes.items() if process.poll() is not None or self._gave_up(name)]
        for name in ended:
            self.kill(name)
            self.start(name, self.commands[name])
        return ended

    def _gave_up(self, name: str) -> bool:
        log = (self.folder / f"{name}.log").read_bytes()[self.begins[name]:]
        return any(text in log for text in GAVE_UP)

    def tree(self, *names: str) -> Iterator[Path]:
        """Yields the folders in /proc of these processes, or of all, and of what they have started; Linux only."""
        left = [self.processes[name].pid for name in names or list(self.processes)]
        while left:
            folder = Path("/proc") / str(left.pop())
            with contextlib.suppress(OSError):
                left += [int(pid) for file in folder.glob("task/*/children") for pid in file.read_text().split()]
                yield folder

    def close(self) -> None:
        for name in list(self.processes)[::-1]:
            self.stop(name)
        if self.wire is not None:
            self.wire.close()

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_certificate(folder: Path) -> None:
    """Writes ca.crt, server.crt and server.key: a server's certificate for 127.0.0.1, signed by an authority of its
    own."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def signed(name: str, key: ec.EllipticCurvePrivateKey, by: str, with_key: ec.EllipticCurvePrivateKey,
               authority: bool) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        subject, issuer = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, n)]) for n in (name, by))
        return (x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
                .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(hours=1))
                .not_valid_after(now + datetime.timedelta(days=2))
                .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
                .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
                .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(with_key.public_key()),
                               critical=False)
                .add_extension(x509.SubjectAlternativeName([
                    x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
                .sign(with_key, hashes.SHA256()))

    root, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    (folder / "ca.crt").write_bytes(signed("demo", root, "demo", root, True).public_bytes(pem))
    (folder / "server.crt").write_bytes(signed("server", server, "demo", root, False).public_bytes(pem))
    (folder / "server.key").write_bytes(server.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))


def make_key(folder: Path, name: str) -> str:
    """Writes a node's private key `<name>` and public key `<name>.pub`, and returns the public one."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()))
    (folder / name).chmod(0o600)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (folder / f"{name}.pub").write_bytes(public)
    return public.decode()
