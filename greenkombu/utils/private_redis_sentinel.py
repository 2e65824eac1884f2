"""A replicated Redis of one's own with the sentinels that watch over it.

For tests and the soak only. What a `PrivateRedis` is goes for each server and each sentinel; here
is what makes them one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from greenkombu.utils._private_server import PrivateBrokerError, late_sleep
from greenkombu.utils.private_redis import PrivateRedis, quoted, wait_until

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["PrivateSentinel"]

#: Milliseconds of what a sentinel does now and then (SENTINEL DEBUG, Redis 7): what takes seconds
#: by default, such as to hear of each other, takes a fraction of one.
PERIODS = {
    # During a failover it asks a replica once in a second, and believes the answer five times that.
    "ping-period": 500,
    "ask-period": 100,
    "info-period": 300,
    "publish-period": 200,
    # One that was not scheduled for two seconds would do nothing for half a minute.
    "tilt-trigger": 60_000,
}


class _Sentinel(PrivateRedis):
    """One sentinel, which is the Redis server in another mode."""

    ARGUMENTS: ClassVar = ("--sentinel",)

    def _configuration(self) -> dict[str, str]:
        lines = super()._configuration()
        # A sentinel refuses what belongs to data.
        for name in ("save", "repl-diskless-sync-delay", "repl-ping-replica-period", "masterauth"):
            if name not in self._settings:
                lines.pop(name, None)
        return lines


class PrivateSentinel:
    """A master, its replicas and the sentinels, started by `start()` and removed by `close()`.

    A start takes about a second.

    Args:
        replicas: how many.
        sentinels: how many; more than half of them have to live for a failover.
        name: of the master, as the sentinels call it.
        down_after: seconds without an answer after which a sentinel takes a server for down.
        sentinel_password: of the sentinels; None asks for none. They write both passwords to their
            files as they are and could not read blanks or quotes when they start again.
        sleep, password, append_only, settings, timeout: see `PrivateRedis`; they go for the servers
            and not for the sentinels.

    Attributes:
        servers: of the data, each of which can be killed, frozen and started again; who is the
            master changes.
        sentinels: likewise.
        name: as given.
    """

    def __init__(
        self,
        *,
        replicas: int = 1,
        sentinels: int = 3,
        name: str = "main",
        down_after: float = 1.0,
        sentinel_password: str | None = None,
        sleep: Callable[[float], object] | None = None,
        password: str | None = None,
        append_only: bool = False,
        settings: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> None:
        self.name = name
        self._down_after = down_after
        self._password = password
        self._sentinel_password = sentinel_password
        self._sleep = sleep or late_sleep
        self._timeout = timeout
        self._options: dict[str, Any] = {
            "sleep": sleep,
            "password": password,
            "append_only": append_only,
            "timeout": timeout,
        }
        self._settings = dict(settings or {})
        self.servers = [PrivateRedis(**self._options, settings=self._settings)]
        self._replicas = replicas
        self._count = sentinels
        self.sentinels: list[PrivateRedis] = []

    def start(self) -> PrivateSentinel:
        """Start everything, and wait until each knows of all the others.

        Raises:
            RedisNotInstalledError: no server on this machine.
            PrivateBrokerError: they did not start, or did not find each other; all are gone.
        """
        if self.sentinels:
            self.restore()
            return self
        try:
            master = self.servers[0].start()
            settings = {**self._settings, "replicaof": f"127.0.0.1 {master.port}"}
            for _ in range(self._replicas):
                self.servers.append(PrivateRedis(**self._options, settings=settings))
                self.servers[-1].start()
            # A sentinel looks once, when it meets the master, and then not for a long time.
            self._until("the replicas have joined", lambda: self._is_replicated(master))
            for _ in range(self._count):
                self.sentinels.append(self._make_sentinel(master))
                self.sentinels[-1].start()
            self._settle()
        except BaseException:  # also a Timeout or a kill of the waiting greenlet
            self.close()
            raise
        return self

    def _make_sentinel(self, master: PrivateRedis) -> PrivateRedis:
        name, quorum = self.name, self._count // 2 + 1
        settings = {
            "sentinel monitor": f"{name} 127.0.0.1 {master.port} {quorum}",
            "sentinel down-after-milliseconds": f"{name} {int(self._down_after * 1000)}",
            # After a split vote it is tried again after twice that.
            "sentinel failover-timeout": f"{name} 3000",
        }
        if self._password is not None:
            settings["sentinel auth-pass"] = f"{name} {quoted(self._password)}"
        return _Sentinel(
            sleep=self._sleep,
            password=self._sentinel_password,
            settings=settings,
            timeout=self._timeout,
        )

    # -- facts -----------------------------------------------------------------------------------

    @property
    def master(self) -> PrivateRedis:
        """The server that the sentinels which run take for the master.

        Raises:
            PrivateBrokerError: they do not agree, or none runs.
        """
        ports = {
            int(sentinel.command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.name)[1])
            for sentinel in self.sentinels
            if sentinel.running
        }
        for server in self.servers:
            if ports == {server.port}:
                return server
        raise PrivateBrokerError(f"{self!r} has no master: {sorted(ports) or 'no sentinel'}")

    @property
    def replicas(self) -> list[PrivateRedis]:
        """The other servers, whether they run or not."""
        master = self.master
        return [server for server in self.servers if server is not master]

    @property
    def url(self) -> str:
        """The URLs of all sentinels, for a connection with `transport_options`."""
        credentials = self.servers[0].credentials
        return ";".join(
            f"sentinel://{credentials}127.0.0.1:{sentinel.port}/0" for sentinel in self.sentinels
        )

    @property
    def transport_options(self) -> dict[str, Any]:
        """What a connection needs besides the URL."""
        options: dict[str, Any] = {"master_name": self.name}
        if self._sentinel_password is not None:
            options["sentinel_kwargs"] = {"password": self._sentinel_password}
        return options

    # -- faults ----------------------------------------------------------------------------------

    def failover(self) -> PrivateRedis:
        """Let the sentinels make a replica the master while the old master lives.

        Returns:
            The new master, when all is in order again.
        """
        old = self.master
        sentinel = next(sentinel for sentinel in self.sentinels if sentinel.running)

        looks = itertools.count()

        def changed() -> bool:
            if self._has_replaced(old):
                return True
            # Refused while another one is under way, or no replica is good yet; it may also fail.
            if next(looks) % 20 == 0:
                sentinel.command("SENTINEL", "FAILOVER", self.name)
            return False

        self._until("another server is the master", changed)
        self._settle()
        return self.master

    def kill_master(self) -> PrivateRedis:
        """End the master with SIGKILL and return it; `wait_failover` waits for another."""
        master = self.master
        master.kill()
        return master

    def wait_failover(self, old: PrivateRedis) -> PrivateRedis:
        """Wait until another server than `old` is the master, and accepts writes; return it."""
        self._until("another server is the master", lambda: self._has_replaced(old))
        return self.master

    def restore(self) -> None:
        """Start what does not run, and wait until all know each other and are in order."""
        for server in [*self.servers, *self.sentinels]:
            server.thaw()
            server.start()
        self._settle()

    # -- inside ----------------------------------------------------------------------------------

    def _has_replaced(self, old: PrivateRedis) -> bool:
        master = self.master
        return master is not old and bool(master.command("ROLE")[0] == b"master")

    def _settle(self) -> None:
        for sentinel in self.sentinels:
            # Of Redis 7; an older one takes its time.
            words = [str(word) for item in PERIODS.items() for word in item]
            try:
                sentinel.command("SENTINEL", "DEBUG", *words)
            except PrivateBrokerError:
                pass
        self._until("all is in order", self._is_settled)

    def _is_settled(self) -> bool:
        master = self.master
        for sentinel in self.sentinels:
            seen = _fields(sentinel.command("SENTINEL", "MASTER", self.name))
            if (
                seen["flags"] != "master"
                or int(seen["num-slaves"]) != len(self.servers) - 1
                or int(seen["num-other-sentinels"]) != len(self.sentinels) - 1
            ):
                return False
            for replica in sentinel.command("SENTINEL", "REPLICAS", self.name):
                known = _fields(replica)
                if known["flags"] != "slave" or known["master-port"] != str(master.port):
                    return False
        return self._is_replicated(master)

    def _is_replicated(self, master: PrivateRedis) -> bool:
        """Return whether all others are replicas of that server and have its data."""
        role, sent, replicas = master.command("ROLE")
        if role != b"master" or len(replicas) != len(self.servers) - 1:
            return False
        for server in self.servers:
            if server is master:
                continue
            role = server.command("ROLE")
            # Connected it is up to a second before the first commands come.
            if role[:1] + role[2:4] != [b"slave", master.port, b"connected"] or role[4] < sent:
                return False
        return True

    def _until(self, what: str, ready: Callable[[], bool]) -> None:
        wait_until(f"{self!r}: {what}", ready, self._timeout, self._sleep)

    def close(self) -> None:
        """End everything at once and remove the folders; idempotent."""
        for server in [*self.sentinels, *self.servers]:
            server.close()

    def __enter__(self) -> PrivateSentinel:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<PrivateSentinel {self.servers!r} sentinels={self.sentinels!r}>"


def _fields(flat: list[bytes]) -> dict[str, str]:
    words = [word.decode() for word in flat]
    return dict(zip(words[::2], words[1::2], strict=True))
