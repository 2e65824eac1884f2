"""A Redis Cluster of one's own: several private servers on this machine.

For tests and the soak only. What a `PrivateRedis` is goes for each node; here is what makes them
one. It needs Redis 7.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from greenkombu.utils._private_server import PrivateBrokerError, free_ports, late_sleep
from greenkombu.utils.private_redis import PrivateRedis, wait_until

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["SLOTS", "ClusterNode", "PrivateRedisCluster"]

#: How many hash slots every cluster has.
SLOTS = 16_384


class ClusterNode(PrivateRedis):
    """One node, which has a second port, for the other nodes."""

    bus_port = 0

    def _choose_ports(self) -> None:
        self.port, self.bus_port = free_ports(2)

    def _configuration(self) -> dict[str, str]:
        # By default the second port is the first plus 10000, which may be taken.
        return {"cluster-port": str(self.bus_port), **super()._configuration()}

    @property
    def name(self) -> str:
        """What the other nodes call it."""
        return str(self.command("CLUSTER", "MYID").decode())


class PrivateRedisCluster:
    """Redis servers that form one cluster, started by `start()` and removed by `close()`.

    A start takes about 3 s. No replica moves to another master by itself.

    Args:
        masters: how many; at least three, for a majority of them has to agree that one is down.
        replicas: how many of each master.
        node_timeout: seconds without an answer after which a node takes another for down.
        sleep, password, append_only, settings, timeout: see `PrivateRedis`.

    Attributes:
        nodes: the servers, each of which can be killed, frozen and started again; who is a master
            changes.
    """

    def __init__(
        self,
        masters: int = 3,
        replicas: int = 1,
        *,
        node_timeout: float = 1.5,
        sleep: Callable[[float], object] | None = None,
        password: str | None = None,
        append_only: bool = False,
        settings: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> None:
        self._masters = masters
        self._replicas = replicas
        self._sleep = sleep or late_sleep
        self._timeout = timeout
        self._formed = False
        self.nodes: list[ClusterNode] = [
            ClusterNode(
                sleep=sleep,
                password=password,
                append_only=append_only,
                settings={
                    "cluster-enabled": "yes",
                    "cluster-config-file": "nodes.conf",
                    "cluster-node-timeout": str(int(node_timeout * 1000)),
                    "cluster-allow-replica-migration": "no",
                    # However old its data is: this is no place to wait for an operator.
                    "cluster-replica-validity-factor": "0",
                    **(settings or {}),
                },
                timeout=timeout,
            )
            for _ in range(masters * (replicas + 1))
        ]

    def start(self) -> PrivateRedisCluster:
        """Start the nodes that do not run, and wait until all are together.

        Raises:
            RedisNotInstalledError: no server on this machine.
            PrivateBrokerError: a node did not start, or did not find the others; all are gone.
        """
        try:
            for node in self.nodes:
                node.start()
            if not self._formed:
                self._form()
                self._formed = True
            self._settle()
        except BaseException:  # also a Timeout or a kill of the waiting greenlet
            self.close()
            raise
        return self

    def _form(self) -> None:
        for number, node in enumerate(self.nodes):
            # Different from the start: else the nodes would sort it out between them, in time.
            node.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number < self._masters:
                first = number * SLOTS // self._masters
                last = (number + 1) * SLOTS // self._masters - 1
                node.command("CLUSTER", "ADDSLOTSRANGE", first, last)
        for node in self.nodes[1:]:
            self.nodes[0].command("CLUSTER", "MEET", "127.0.0.1", node.port, node.bus_port)
        everyone = {node.port for node in self.nodes}
        self._until(
            "the nodes have met",
            lambda: all(self._met(node) == everyone for node in self.nodes),
        )
        for number, node in enumerate(self.nodes[self._masters :]):
            master = self.nodes[number % self._masters].name
            node.command("CLUSTER", "REPLICATE", master)

    def _met(self, node: ClusterNode) -> set[int]:
        """Return the ports of those that a node knows well."""
        return {
            int(fields[1].split("@")[0].rpartition(":")[2])
            for fields in self._known(node)
            if "handshake" not in fields[2]
        }

    # -- facts -----------------------------------------------------------------------------------

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Where each node listens, whether it runs or not."""
        return [("127.0.0.1", node.port) for node in self.nodes]

    @property
    def url(self) -> str:
        """The URLs of all nodes, for a connection."""
        credentials = self.nodes[0].credentials
        return ";".join(
            f"redis+cluster://{credentials}127.0.0.1:{each.port}" for each in self.nodes
        )

    @property
    def masters(self) -> list[ClusterNode]:
        """The nodes that have slots, in the order of those."""
        ranges = self._asked().command("CLUSTER", "SLOTS")
        ports = [entry[2][1] for entry in sorted(ranges, key=lambda entry: int(entry[0]))]
        return [self._at(port) for port in dict.fromkeys(ports)]

    def slot_of(self, key: str | bytes) -> int:
        """Return the slot of a key; what is between braces decides, if there are any."""
        return int(self._asked().command("CLUSTER", "KEYSLOT", key))

    def master_of(self, key: str | bytes | int) -> ClusterNode:
        """Return the node that has a key, or a slot if it is an int."""
        return self._entry(key)[0]

    def replicas_of(self, key: str | bytes | int) -> list[ClusterNode]:
        """Return the living replicas of that node."""
        return self._entry(key)[1:]

    def command(self, key: str | bytes, *words: object) -> Any:
        """Send a command to the node that has the key; see `PrivateRedis.command`.

        The key decides where it goes; it is not added to the words.
        """
        return self.master_of(key).command(*words)

    # -- faults ----------------------------------------------------------------------------------

    def kill_master_of(self, key: str | bytes | int) -> ClusterNode:
        """End the node that has a key with SIGKILL and return it.

        `wait_failover` waits for another.
        """
        master = self.master_of(key)
        master.kill()
        return master

    def wait_failover(self, key: str | bytes | int, old: ClusterNode) -> ClusterNode:
        """Wait until another node than `old` has the key, and all that run know; return it."""
        self._until("another node has taken over", lambda: self._has_replaced(key, old))
        return self.master_of(key)

    def failover_of(self, key: str | bytes | int) -> ClusterNode:
        """Let a replica take over from its living master, in good order; return the new master."""
        old = self.master_of(key)
        looks = itertools.count()

        def changed() -> bool:
            # A replica that could not do it within 5 s gives up.
            if next(looks) % 200 == 0:
                self.replicas_of(key)[0].command("CLUSTER", "FAILOVER")
            return self._has_replaced(key, old)

        self._until("another node has taken over", changed)
        self._settle()
        return self.master_of(key)

    def start_moving(self, slot: int, target: ClusterNode) -> None:
        """Begin to move a slot: who asks its node for a key that is not there gets ASK."""
        source = self.master_of(slot)
        target.command("CLUSTER", "SETSLOT", slot, "IMPORTING", source.name)
        source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", target.name)

    def move_keys(self, slot: int, target: ClusterNode) -> None:
        """Move the keys of a slot that is being moved."""
        source = self.master_of(slot)
        access = ["AUTH", source.password] if source.password is not None else []
        while keys := source.command("CLUSTER", "GETKEYSINSLOT", slot, 100):
            milliseconds = int(self._timeout * 1000)
            head = ["MIGRATE", "127.0.0.1", target.port, "", 0, milliseconds]
            source.command(*head, *access, "KEYS", *keys)

    def finish_moving(self, slot: int, target: ClusterNode) -> None:
        """Tell all nodes who has the slot: the old one answers MOVED."""
        source, name = self.master_of(slot), target.name
        for node in (target, source, *self.masters):
            node.command("CLUSTER", "SETSLOT", slot, "NODE", name)
        self._until(
            "all know who has the slot",
            lambda: all(self._entry(slot, node)[0] is target for node in self.nodes),
        )

    def move_slot(self, slot: int, target: ClusterNode) -> None:
        """Move a slot with its keys to another master."""
        if self.master_of(slot) is not target:
            self.start_moving(slot, target)
            self.move_keys(slot, target)
            self.finish_moving(slot, target)

    def restore(self) -> None:
        """Start what does not run, and wait until all know each other and are in order."""
        for node in self.nodes:
            node.thaw()
            node.start()
        self._settle()

    # -- inside ----------------------------------------------------------------------------------

    def _asked(self) -> ClusterNode:
        for node in self.nodes:
            if node.running:
                return node
        raise PrivateBrokerError(f"no node of {self!r} runs")

    def _at(self, port: int) -> ClusterNode:
        for node in self.nodes:
            if node.port == port:
                return node
        raise PrivateBrokerError(f"no node of {self!r} listens on port {port}")

    def _entry(self, key: str | bytes | int, asked: ClusterNode | None = None) -> list[ClusterNode]:
        """Return the master of a key's slot and its replicas, as a node sees it."""
        slot = key if isinstance(key, int) else self.slot_of(key)
        for first, last, *nodes in (asked or self._asked()).command("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return [self._at(node[1]) for node in nodes]
        raise PrivateBrokerError(f"nobody has slot {slot} in {self!r}")

    def _state(self, node: ClusterNode) -> str:
        text = node.command("CLUSTER", "INFO").decode()
        return str(text.partition("cluster_state:")[2].split()[0])

    def _known(self, node: ClusterNode) -> list[list[str]]:
        """Return the lines of CLUSTER NODES in fields."""
        text = node.command("CLUSTER", "NODES").decode()
        return [line.split(" ") for line in text.splitlines()]

    def _has_replaced(self, key: str | bytes | int, old: ClusterNode) -> bool:
        """Return whether all nodes that run say that another one has the key."""
        return all(
            self._entry(key, node)[0] is not old and self._state(node) == "ok"
            for node in self.nodes
            if node.running
        )

    def _settle(self) -> None:
        self._until("all is in order", lambda: all(map(self._is_settled, self.nodes)))

    def _is_settled(self, node: ClusterNode) -> bool:
        """Return whether a node knows a master and its replicas for all slots, and all are well."""
        known = self._known(node)
        if self._state(node) != "ok" or len(known) != len(self.nodes):
            return False
        if any("fail" in fields[2] or fields[7] != "connected" for fields in known):
            return False
        ranges = node.command("CLUSTER", "SLOTS")
        if any(len(entry) != 3 + self._replicas for entry in ranges):
            return False
        role = node.command("ROLE")
        return bool(
            len(role[2]) == self._replicas if role[0] == b"master" else role[3] == b"connected"
        )

    def _until(self, what: str, ready: Callable[[], bool]) -> None:
        wait_until(f"{self!r}: {what}", ready, self._timeout, self._sleep)

    def close(self) -> None:
        """End all nodes at once and remove their folders; idempotent."""
        for node in self.nodes:
            node.close()

    def __enter__(self) -> PrivateRedisCluster:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<PrivateRedisCluster {self.nodes!r}>"
