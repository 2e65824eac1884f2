"""The brokers of a soak and what can happen to them: `BROKERS` names them.

A new kind is a subclass of `SoakBroker` that starts a server and adds the faults of its own; the
faults of links come with the proxies, which know nothing of what they carry.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, ClassVar

from greenkombu.utils.private_rabbitmq import PrivateRabbitMQ
from greenkombu.utils.private_redis import PrivateRedis
from greenkombu.utils.private_redis_cluster import PrivateRedisCluster
from greenkombu.utils.private_redis_sentinel import PrivateSentinel
from hub.environment import get_environment
from tests.support.fault_proxy import FaultProxy
from tests.support.rabbitmq import make_rabbitmq
from tests.support.redis import make_cluster, make_redis, make_sentinel

__all__ = ["BROKERS", "SoakBroker"]

#: A fault: it happens, lasts as long as the call, and is over when that returns.
Fault = Callable[[], None]


class SoakBroker:
    """A server with two proxies in front: one for publishers, one for consumers.

    Args:
        chance: chooses what a fault strikes, and for how long.

    Attributes:
        queues: their names and arguments; all of them have to survive the server's crash.
        options: of every connection.
    """

    queues: ClassVar[dict[str, dict[str, Any]]] = {}
    options: ClassVar[dict[str, Any]] = {}
    #: Seconds between two strikes at consuming processes, from and to.
    process_pause: ClassVar[tuple[float, float]] = (1, 6)
    #: The part of them that freezes a process for a while; the others kill one.
    process_freezes: ClassVar[float] = 0.3

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.proxies: list[FaultProxy] = []
        self.faults: list[tuple[int, Fault]] = [
            (4, self.reset),
            (4, self.finish),
            (4, self.cut),
            (3, self.black_hole),
            (2, self.slow),
            (1, self.refuse),
        ]

    def start(self) -> None:
        """Start the server and the proxies, and make the queues."""
        address = self.start_server()
        self.proxies = [FaultProxy(address) for _ in range(2)]

    def start_server(self) -> tuple[str, int]:
        """Start the server; return host and port."""
        raise NotImplementedError

    @property
    def url(self) -> str:
        """The server's own URL."""
        raise NotImplementedError

    @property
    def publisher_url(self) -> str:
        """The URL for publishers."""
        return self.proxies[0].url(self.url)

    @property
    def consumer_url(self) -> str:
        """The URL for consumers."""
        return self.proxies[1].url(self.url)

    def recover(self) -> None:
        """End every fault."""
        for proxy in self.proxies:
            proxy.restore()

    def holdings(self) -> str:
        """Return what the server says of its messages, for whoever misses some."""
        return "unknown"

    def left_behind(self) -> list[str]:
        """Return what clients that have all closed still hold at the server."""
        return []

    def close(self) -> None:
        """End the proxies and the server."""
        for proxy in self.proxies:
            proxy.close()

    # -- faults of the links

    def _links(self) -> tuple[FaultProxy, list[int]]:
        """Choose a proxy and some of its open links, at least one where there are any."""
        proxy = self.chance.choice(self.proxies)
        numbers = [link.number for link in proxy.open_links()]
        return proxy, self.chance.sample(
            numbers, self.chance.randint(min(1, len(numbers)), len(numbers))
        )

    def _for(self, shortest: float, longest: float) -> None:
        get_environment().sleep(self.chance.uniform(shortest, longest))

    def reset(self) -> None:
        """RST."""
        proxy, links = self._links()
        proxy.reset(links)

    def finish(self) -> None:
        """FIN."""
        proxy, links = self._links()
        proxy.finish(links)

    def cut(self) -> None:
        """Cut within a frame, most likely, or stop there."""
        proxy, links = self._links()
        for number in links:
            proxy.cut(
                self.chance.randrange(2000),
                self.chance.choice(("up", "down")),
                self.chance.choice(("rst", "fin", "stop")),
                [number],
            )
        self._for(0.2, 6)
        proxy.restore(links=links)

    def black_hole(self) -> None:
        """Pass nothing on, either way or in one direction; sometimes long enough to be noticed."""
        proxy, links = self._links()
        proxy.black_hole(self.chance.choice(("up", "down", "both")), links)
        self._for(0.2, 8)
        proxy.restore(links=links)

    def slow(self) -> None:
        """Delay, or a narrow link."""
        proxy, links = self._links()
        if self.chance.random() < 0.5:
            proxy.delay(self.chance.uniform(0.01, 0.5), links=links)
        else:
            proxy.bandwidth(self.chance.uniform(2_000, 50_000), links=links)
        self._for(0.5, 4)
        proxy.restore(links=links)

    def refuse(self) -> None:
        """Nothing listens."""
        proxy = self.chance.choice(self.proxies)
        proxy.refuse()
        proxy.reset()
        try:
            self._for(0.2, 3)
        finally:
            proxy.accept()


class RabbitMQ(SoakBroker):
    """RabbitMQ with a classic and a quorum queue."""

    queues: ClassVar = {
        "soak-classic": {"x-queue-type": "classic"},
        "soak-quorum": {"x-queue-type": "quorum"},
    }
    options: ClassVar = {
        "heartbeat": 2,
        "connect_timeout": 3,
        "transport_options": {
            "confirm_publish": True,
            "rpc_timeout": 10,
            "confirm_timeout": 10,
            "blocked_timeout": 5,
            "close_timeout": 0.5,
        },
    }

    def __init__(self, chance: random.Random) -> None:
        super().__init__(chance)
        self._server: PrivateRabbitMQ = make_rabbitmq()
        self.faults += [
            (1, self.crash),
            (1, self.restart),
            (1, self.freeze),
            (1, self.alarm),
            (1, self.kick),
            (1, self.lose_confirms),
        ]

    def start_server(self) -> tuple[str, int]:
        self._server.start()
        return "127.0.0.1", self._server.port

    @property
    def url(self) -> str:
        return self._server.url

    def recover(self) -> None:
        super().recover()
        self._server.thaw()
        self._server.start()
        self._server.unblock()

    def holdings(self) -> str:
        columns = ("name", "messages_ready", "messages_unacknowledged", "consumers")
        return " ".join(self._server.ctl("list_queues", *columns).split())

    def left_behind(self) -> list[str]:
        listed = self._server.ctl("list_connections", "peer_port", "state", "channels")
        return [f"a connection at the broker: {line}" for line in listed.splitlines()[1:]]

    def close(self) -> None:
        super().close()
        self._server.close()

    def crash(self) -> None:
        """SIGKILL, and start again after a while."""
        self._server.kill()
        self._for(0, 2)
        self._server.start()

    def restart(self) -> None:
        """SIGTERM, and start again."""
        self._server.restart()

    def freeze(self) -> None:
        """SIGSTOP for a while."""
        self._server.freeze()
        try:
            self._for(0.5, 8)
        finally:
            self._server.thaw()

    def alarm(self) -> None:
        """The memory alarm: publishers are blocked."""
        self._server.block()
        try:
            self._for(0.5, 7)
        finally:
            self._server.unblock()

    def kick(self) -> None:
        """An operator closes all connections (320)."""
        self._server.close_all_connections()

    def lose_confirms(self) -> None:
        """Confirms do not come; the connection is otherwise well."""
        rule = self.proxies[0].drop("Basic.ack", "down")
        self._for(0.2, 3)
        rule.remove()


class Redis(SoakBroker):
    """Redis, which writes every change to disk before it answers."""

    queues: ClassVar = {"soak-one": {}, "soak-two": {}}
    # A thousand kills in ten minutes.
    process_pause = (0.1, 0.6)
    process_freezes = 0.03
    options: ClassVar = {
        "connect_timeout": 3,
        "transport_options": {
            # What a killed consumer held comes back after this.
            "visibility_timeout": 6,
            "socket_timeout": 5,
            "health_check_interval": 2,
        },
    }

    def __init__(self, chance: random.Random) -> None:
        super().__init__(chance)
        self._server: PrivateRedis = make_redis(append_only=True)
        self.faults += [
            (1, self.crash),
            (1, self.restart),
            (1, self.freeze),
            (1, self.pause),
            (1, self.kick),
            (1, self.fill),
            (1, self.demote),
            (1, self.forget_scripts),
        ]

    def start_server(self) -> tuple[str, int]:
        self._server.start()
        return "127.0.0.1", self._server.port

    @property
    def url(self) -> str:
        return self._server.url

    def recover(self) -> None:
        super().recover()
        self._server.thaw()
        self._server.start()
        self._server.empty()
        self._server.promote()

    def holdings(self) -> str:
        return _holdings(self._server)

    def left_behind(self) -> list[str]:
        return _left_behind(self._server)

    def close(self) -> None:
        super().close()
        self._server.close()

    def crash(self) -> None:
        """SIGKILL, and start again after a while."""
        self._server.kill()
        self._for(0, 2)
        self._server.start()

    def restart(self) -> None:
        """SIGTERM, and start again."""
        self._server.restart()

    def freeze(self) -> None:
        """SIGSTOP for a while."""
        self._server.freeze()
        try:
            self._for(0.5, 8)
        finally:
            self._server.thaw()

    def pause(self) -> None:
        """The server answers nobody, or no writes, and ends that by itself."""
        self._server.pause(self.chance.uniform(0.2, 7), writes_only=self.chance.random() < 0.5)

    def kick(self) -> None:
        """An operator closes all connections."""
        self._server.kick()

    def fill(self) -> None:
        """The memory is full: writes are refused."""
        self._server.fill()
        try:
            self._for(0.2, 4)
        finally:
            self._server.empty()

    def demote(self) -> None:
        """The server is a replica for a while: writes are refused."""
        self._server.demote()
        try:
            self._for(0.2, 4)
        finally:
            self._server.promote()

    def forget_scripts(self) -> None:
        """The scripts have to be sent again."""
        self._server.command("SCRIPT", "FLUSH")


class RedisSentinel(SoakBroker):
    """Redis with a replica and three sentinels, who name addresses: no proxy can be in between.

    Only what loses nothing by itself happens here. Replication is asynchronous: a master that is
    replaced while it lives goes on to accept messages for a moment, and they are lost.
    """

    queues: ClassVar = Redis.queues
    options: ClassVar = {
        "connect_timeout": 3,
        "transport_options": {**Redis.options["transport_options"], "master_name": "main"},
    }

    def __init__(self, chance: random.Random) -> None:
        super().__init__(chance)
        self._servers: PrivateSentinel = make_sentinel(append_only=True)
        self.faults = [
            (3, self.kill_master),
            (2, self.kill_replica),
            (2, self.kill_sentinel),
            (2, self.kick),
        ]

    def start(self) -> None:
        self._servers.start()

    @property
    def url(self) -> str:
        return self._servers.url

    @property
    def publisher_url(self) -> str:
        return self.url

    @property
    def consumer_url(self) -> str:
        return self.url

    def recover(self) -> None:
        self._servers.restore()

    def holdings(self) -> str:
        return _holdings(self._servers.master)

    def left_behind(self) -> list[str]:
        return _left_behind(self._servers.master)

    def close(self) -> None:
        self._servers.close()

    def kill_master(self) -> None:
        """SIGKILL; the replica takes over, and the old master comes back as its replica."""
        old = self._servers.kill_master()
        self._servers.wait_failover(old)
        self._for(0, 3)
        self._servers.restore()

    def kill_replica(self) -> None:
        """SIGKILL, and start again after a while."""
        self._servers.replicas[0].kill()
        self._for(0, 2)
        self._servers.restore()

    def kill_sentinel(self) -> None:
        """SIGKILL, and start again after a while."""
        self.chance.choice(self._servers.sentinels).kill()
        self._for(0, 4)
        self._servers.restore()

    def kick(self) -> None:
        """An operator closes all connections."""
        self._servers.master.kick()


class RedisCluster(SoakBroker):
    """A Redis Cluster of three masters with a replica each; without proxies, as `RedisSentinel`."""

    queues: ClassVar = {f"soak-{name}": {} for name in ("one", "two", "three", "four")}
    options = Redis.options

    def __init__(self, chance: random.Random) -> None:
        super().__init__(chance)
        self._nodes: PrivateRedisCluster = make_cluster(append_only=True)
        self.faults = [
            (3, self.kill_master),
            (2, self.kill_replica),
            (3, self.move_slot),
            (2, self.take_over),
            (2, self.kick),
        ]

    def start(self) -> None:
        self._nodes.start()

    @property
    def url(self) -> str:
        return self._nodes.url

    @property
    def publisher_url(self) -> str:
        return self.url

    @property
    def consumer_url(self) -> str:
        return self.url

    def recover(self) -> None:
        self._nodes.restore()

    def holdings(self) -> str:
        return "; ".join(
            f"{name}={self._ask(name, 'LLEN', '{}')} ready,"
            f" {self._ask(name, 'HLEN', 'unacked:{}')} unacked"
            for name in self.queues
        )

    def left_behind(self) -> list[str]:
        lines = [
            f"a connection at {node!r}: {client}"
            for node in self._nodes.nodes
            for client in node.clients()
            # Replicas and masters are clients, too, and who has moved keys to it.
            if not set("SM") & set(client["flags"]) and client["cmd"] != "restore-asking"
        ]
        for name in self.queues:
            hash_ = self._ask(name, "HKEYS", "unacked:{}")
            index = self._ask(name, "ZRANGE", "unacked_index:{}", 0, -1)
            if set(hash_) != set(index):
                lines.append(f"unacked and its index of {name} differ: {hash_[:5]} {index[:5]}")
        return lines

    def close(self) -> None:
        self._nodes.close()

    def _key(self) -> str:
        """Return what decides about the slot of some queue."""
        return "{" + self.chance.choice(list(self.queues)) + "}"

    def _ask(self, queue: str, command: str, key: str, *words: object) -> Any:
        tag = "{" + queue + "}"
        return self._nodes.command(tag, command, key.replace("{}", tag), *words)

    def kill_master(self) -> None:
        """SIGKILL; the replica takes over, and the old master comes back as its replica."""
        key = self._key()
        self._nodes.wait_failover(key, self._nodes.kill_master_of(key))
        self._for(0, 3)
        self._nodes.restore()

    def kill_replica(self) -> None:
        """SIGKILL, and start again after a while."""
        self._nodes.replicas_of(self._key())[0].kill()
        self._for(0, 2)
        self._nodes.restore()

    def move_slot(self) -> None:
        """All of a queue moves to another master, in a while."""
        key = self._key()
        slot, source = self._nodes.slot_of(key), self._nodes.master_of(key)
        target = self.chance.choice([node for node in self._nodes.masters if node is not source])
        self._nodes.start_moving(slot, target)
        self._for(0, 1)
        self._nodes.move_keys(slot, target)
        self._for(0, 1)
        self._nodes.finish_moving(slot, target)

    def take_over(self) -> None:
        """A replica takes the place of its living master."""
        self._nodes.failover_of(self._key())

    def kick(self) -> None:
        """An operator closes all connections to a server."""
        self._nodes.master_of(self._key()).kick()


def _holdings(server: PrivateRedis) -> str:
    """Return the lengths of the queues, and who holds how many for how long."""
    names = (b"soak-one", b"soak-two")
    *lengths, held, mutex, left_ms, now = server.commands(
        [
            *[("LLEN", name) for name in names],
            ("ZRANGE", "unacked_index", 0, -1, "WITHSCORES"),
            ("GET", "unacked_mutex"),
            ("PTTL", "unacked_mutex"),
            ("TIME",),
        ]
    )
    texts = [f"{name.decode()}={length}" for name, length in zip(names, lengths, strict=True)]
    if mutex is not None:
        texts.append(f"{mutex.decode()} puts back, for {left_ms / 1000:.0f} s at most")
    for token, taken in zip(held[::2], held[1::2], strict=True):
        texts.append(f"{token.decode()} renewed {int(now[0]) - float(taken):.0f} s ago")
    texts += [
        f"client {client['name']} cmd={client['cmd']} idle={client['idle']}"
        for client in server.clients()
    ]
    return "; ".join(texts)


def _left_behind(server: PrivateRedis) -> list[str]:
    """Return what is at a server that all clients have left, and should not be."""
    lines = [
        f"a connection at the broker: {client}"
        for client in server.clients()
        # Replicas and sentinels are clients, too.
        if "S" not in client["flags"] and not client["name"].startswith("sentinel-")
    ]
    hash_, index = server.commands([("HKEYS", "unacked"), ("ZRANGE", "unacked_index", 0, -1)])
    if set(hash_) != set(index):
        lines.append(f"unacked and its index differ: {sorted({*hash_} ^ {*index})[:10]}")
    for key in server.command("KEYS", "*"):
        if key not in (b"unacked", b"unacked_index", b"soak-one", b"soak-two"):
            seconds = server.command("TTL", key)
            if seconds == -1:
                lines.append(f"a key that stays for ever: {key!r}")
    return lines


#: The kinds of brokers, by the name that ``--broker`` takes.
BROKERS: dict[str, type[SoakBroker]] = {
    "amqp": RabbitMQ,
    "redis": Redis,
    "sentinel": RedisSentinel,
    "cluster": RedisCluster,
}
