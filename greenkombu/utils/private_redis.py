"""Start and torment a Redis server of one's own in a temporary folder.

For tests and for ``greenkombu demo --broker redis``; never for production. The server runs as the
calling user, listens on loopback only, has its own ports and data, and so lives beside the
machine's own Redis and beside other private ones without touching them. A guard process
(`greenkombu.utils._guard`) ends it when this process ends, however that happens.

Commands to it (`PrivateRedis.command`) go over a small blocking client of this module, so that a
test which doubts a client has somebody else to ask.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote

from greenkombu.utils._private_server import (
    PrivateBrokerError,
    PrivateServer,
    TLSFiles,
    free_ports,
)

if TYPE_CHECKING:
    from io import BufferedReader
    from pathlib import Path

__all__ = [
    "PrivateBrokerError",
    "PrivateRedis",
    "RedisCommandError",
    "RedisNotInstalledError",
    "TLSFiles",
    "find_redis",
    "free_ports",
    "quoted",
    "wait_until",
]

#: Where the server is when it is not on PATH.
PLACES = (
    "/usr/bin/redis-server",
    "/usr/local/bin/redis-server",
    "/opt/homebrew/bin/redis-server",
)


class RedisNotInstalledError(PrivateBrokerError):
    """This machine has no Redis server that could be started."""


class RedisCommandError(PrivateBrokerError):
    """The server answered a command with an error."""


def find_redis() -> str | None:
    """Return the path of `redis-server`, None if there is none."""
    import os
    import shutil

    found = shutil.which("redis-server")
    return found or next((place for place in PLACES if os.access(place, os.X_OK)), None)


class PrivateRedis(PrivateServer):
    """A Redis server in a temporary folder, started by `start()` and removed by `close()`.

    A start takes about 0.05 s.

    Args:
        sleep: see `PrivateServer`.
        password: of the default user; None asks for none.
        append_only: write each change to disk before it is answered, so that a killed server
            loses nothing; else every restart begins with an empty server.
        unix_socket: also listen on a Unix socket in the folder.
        tls: also listen for TLS with these files.
        max_memory: the server refuses writes above it (OOM), in Redis's notation ("10mb").
        settings: further lines for `redis.conf`; they win.
        timeout: seconds that each step (start, stop, a command) may take.

    Raises:
        RedisNotInstalledError: by `start()`: no server on this machine.

    Attributes:
        password: as given.
        tls_port: on which it listens for TLS; 0 if it does not.
    """

    PORT_TAKEN: ClassVar = "Address already in use"

    #: Further arguments of the server, after its configuration.
    ARGUMENTS: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        *,
        sleep: Callable[[float], object] | None = None,
        password: str | None = None,
        append_only: bool = False,
        unix_socket: bool = False,
        tls: TLSFiles | None = None,
        max_memory: str | None = None,
        settings: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> None:
        super().__init__("redis", sleep=sleep, timeout=timeout)
        self.password = password
        self.tls = tls
        self.tls_port = 0
        self._append_only = append_only
        self._unix_socket = unix_socket
        self._max_memory = max_memory
        self._settings = dict(settings or {})

    # -- life ------------------------------------------------------------------------------------

    def _launch(self) -> None:
        program = find_redis()
        if program is None:
            raise RedisNotInstalledError(
                "no Redis server found; install it, for example: apt-get install redis-server"
            )
        if not self.port:
            self.choose_place()
        (self.folder / "pid").unlink(missing_ok=True)
        # A file and not arguments: everybody may read those, with the password in them. The server
        # rewrites it when its part changes (CONFIG REWRITE), and keeps that over a restart.
        command = [program, str(self.folder / "redis.conf"), *self.ARGUMENTS]
        self._state.start("server", command, _environment())

    def choose_place(self) -> None:
        """Choose the folder and the ports, and write the configuration.

        The first start does it, unless somebody has to know the ports before.
        """
        folder = self._state.make_folder()
        self._choose_ports()
        lines = "".join(f"{name} {value}\n" for name, value in self._configuration().items())
        path = folder / "redis.conf"
        path.touch(0o600)
        path.write_text(lines)

    def _choose_ports(self) -> None:
        if self.tls is None:
            (self.port,) = free_ports(1)
        else:
            self.port, self.tls_port = free_ports(2)

    def _configuration(self) -> dict[str, str]:
        lines = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": quoted(str(self.folder)),
            "pidfile": quoted(str(self.folder / "pid")),
            "save": '""',
            # A replica is at once what its master is; by default it waits for others to come.
            "repl-diskless-sync-delay": "0",
            "repl-ping-replica-period": "1",
        }
        if self.password is not None:
            lines |= {"requirepass": quoted(self.password), "masterauth": quoted(self.password)}
        if self._append_only:
            lines |= {"appendonly": "yes", "appendfsync": "always"}
        if self._unix_socket:
            lines |= {"unixsocket": quoted(str(self.socket_path)), "unixsocketperm": "700"}
        if self.tls is not None:
            lines |= {
                "tls-port": str(self.tls_port),
                "tls-ca-cert-file": quoted(str(self.tls.ca)),
                "tls-cert-file": quoted(str(self.tls.certificate)),
                "tls-key-file": quoted(str(self.tls.key)),
                "tls-auth-clients": "no" if self.tls.external_user is None else "yes",
            }
        if self._max_memory is not None:
            lines["maxmemory"] = self._max_memory
        return lines | self._settings

    def wait_ready(self) -> None:
        """Wait until a launched server accepts commands; raises as `start`."""
        self._await("server", self._answers)

    def _answers(self) -> bool:
        # Written once it listens: until then it may be somebody else who answers on the port.
        if not (self.folder / "pid").exists():
            return False
        try:
            return bool(self.command("PING", timeout=2.0) == b"PONG")
        except PrivateBrokerError:  # also LOADING: its data is not read yet
            return False

    # -- facts -----------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The URL of database 0."""
        return self.database_url(0)

    def database_url(self, number: int, *, tls: bool = False) -> str:
        """Return the URL of a database.

        Args:
            number: of the database, 0 to 15.
            tls: over TLS; the client has to trust the server's authority.
        """
        scheme, port = ("rediss", self.tls_port) if tls else ("redis", self.port)
        return f"{scheme}://{self.credentials}127.0.0.1:{port}/{number}"

    @property
    def socket_path(self) -> Path:
        """The path of the Unix socket, if the server was made with one."""
        return self.folder / "redis.sock"

    @property
    def socket_url(self) -> str:
        """The URL of database 0 over the Unix socket."""
        return f"redis+socket://{self.credentials}{self.socket_path}"

    @property
    def credentials(self) -> str:
        """What stands before the host in a URL."""
        return "" if self.password is None else f":{quote(self.password, safe='')}@"

    def info(self, section: str = "default") -> dict[str, str]:
        """Return the fields of INFO."""
        text = self.command("INFO", section).decode()
        return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)

    def clients(self) -> list[dict[str, str]]:
        """Return what CLIENT LIST says of each connection but the one that asks."""
        own, listing = self.commands([("CLIENT", "ID"), ("CLIENT", "LIST")])
        lines = [
            dict(field.partition("=")[::2] for field in line.split(" "))
            for line in listing.decode().splitlines()
        ]
        return [line for line in lines if line["id"] != str(own)]

    # -- control ---------------------------------------------------------------------------------

    def command(self, *words: object, database: int = 0, timeout: float | None = None) -> Any:
        """Send one command and return its answer.

        Over a connection of its own, which blocks the thread: for commands that answer at once.

        Args:
            words: the command and its arguments; what is not bytes is sent as its text.
            database: in which it is carried out.
            timeout: seconds; None takes the server's own.

        Returns:
            bytes for texts, int, list or None.

        Raises:
            RedisCommandError: the server answered with an error.
            PrivateBrokerError: it did not answer.
        """
        return self.commands([words], database=database, timeout=timeout)[0]

    def commands(
        self,
        commands: Iterable[Iterable[object]],
        *,
        database: int = 0,
        timeout: float | None = None,
    ) -> list[Any]:
        """Send commands over one connection and return their answers; see `command`."""
        import socket

        first: list[Iterable[object]] = []
        if self.password is not None:
            first.append(("AUTH", self.password))
        if database:
            first.append(("SELECT", database))
        every = [*first, *commands]
        limit = self.timeout if timeout is None else timeout
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=limit) as link:
                link.sendall(b"".join(map(_packed, every)))
                with link.makefile("rb") as stream:
                    answers = [_answer(stream) for _ in every]
        except (OSError, EOFError, ValueError) as error:
            what = " ".join(str(word) for word in [*every[-1]][:2])
            raise PrivateBrokerError(f"{what}: no answer from {self!r}: {error}") from error
        for answer in answers:
            if isinstance(answer, RedisCommandError):
                raise answer
        return answers[len(first) :]

    def flush(self) -> None:
        """Remove all keys of all databases."""
        self.command("FLUSHALL")

    # -- faults ----------------------------------------------------------------------------------

    def kick(self) -> None:
        """Close the connections of all clients, subscribers too."""
        for kind in ("normal", "pubsub"):
            self.command("CLIENT", "KILL", "TYPE", kind)

    def pause(self, seconds: float, *, writes_only: bool = False) -> None:
        """Let the server answer nobody for a while; it reads and accepts.

        Args:
            seconds: until it goes on by itself.
            writes_only: answer to commands that change nothing; `unpause` ends it early.
        """
        mode = "WRITE" if writes_only else "ALL"
        self.command("CLIENT", "PAUSE", int(seconds * 1000), mode)

    def unpause(self) -> None:
        """End a pause of writes; while everything is paused the server does not take it."""
        self.command("CLIENT", "UNPAUSE")

    def fill(self) -> None:
        """Let the server say that its memory is full: writes are refused with OOM."""
        self.command("CONFIG", "SET", "maxmemory", "1")

    def empty(self) -> None:
        """End what `fill` began."""
        self.command("CONFIG", "SET", "maxmemory", self._max_memory or "0")

    def demote(self) -> None:
        """Make the server a replica of nobody who answers: writes are refused with READONLY."""
        self.command("REPLICAOF", "127.0.0.1", "1")

    def promote(self) -> None:
        """Make the server a master (again)."""
        self.command("REPLICAOF", "NO", "ONE")

    def until(self, what: str, ready: Callable[[], bool]) -> None:
        """Wait until a condition holds.

        Args:
            what: the condition in words, for the error.
            ready: whether it does; an error of a private server says no.

        Raises:
            PrivateBrokerError: not within the server's timeout.
        """
        wait_until(f"{self!r}: {what}", ready, self.timeout, self._sleep)


def wait_until(
    what: str, ready: Callable[[], bool], timeout: float, sleep: Callable[[float], object]
) -> None:
    """Wait until a condition holds of private servers; see `PrivateRedis.until`."""
    deadline = time.monotonic() + timeout
    problem = ""
    while True:
        try:
            if ready():
                return
            problem = ""
        except PrivateBrokerError as error:
            problem = f" ({error})"
        if time.monotonic() > deadline:
            raise PrivateBrokerError(f"{what}: not within {timeout:g} s{problem}")
        sleep(0.03)


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "LC_ALL": "C.UTF-8"}


def quoted(text: str) -> str:
    """Return a value of the configuration file; what is not plain is written as \\xHH."""
    plain = "".join(
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\x{byte:02x}"
        for byte in text.encode()
    )
    return f'"{plain}"'


# -- the protocol: RESP2, https://redis.io/docs/latest/develop/reference/protocol-spec/ ------------


def _packed(words: Iterable[object]) -> bytes:
    parts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    body = b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
    return b"*%d\r\n%b" % (len(parts), body)


def _answer(stream: BufferedReader) -> Any:
    """Read one answer; an error is returned and not raised, for it may be part of a list."""
    line = stream.readline()
    if not line.endswith(b"\r\n"):
        raise EOFError("the connection was closed")
    kind, rest = line[:1], line[1:-2]
    if kind == b"+":
        return rest
    if kind == b"-":
        return RedisCommandError(rest.decode(errors="replace"))
    if kind == b":":
        return int(rest)
    length = int(rest)
    if kind == b"$":
        if length < 0:
            return None
        data = stream.read(length + 2)
        if len(data) < length + 2:
            raise EOFError("the connection was closed")
        return data[:-2]
    if kind == b"*":
        return None if length < 0 else [_answer(stream) for _ in range(length)]
    raise ValueError(f"not an answer of Redis: {line[:40]!r}")
