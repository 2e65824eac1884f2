"""A RabbitMQ cluster of one's own: several private servers on this machine.

For tests only. What a `PrivateRabbitMQ` is goes for each node; here is what makes them one. The
nodes find each other by names from their configuration, through one Erlang port mapper (epmd),
and trust each other by one cookie.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from greenkombu.utils._private_server import PrivateBrokerError, free_ports
from greenkombu.utils.private_rabbitmq import Membership, PrivateRabbitMQ

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["PrivateRabbitMQCluster"]


class PrivateRabbitMQCluster:
    """RabbitMQ servers that form one cluster, started by `start()` and removed by `close()`.

    Args:
        size: how many nodes; quorum queues survive the loss of fewer than half of them.
        sleep, settings, plugins, timeout: see `PrivateRabbitMQ`.

    Attributes:
        nodes: the servers, each of which can be killed, frozen and started again.
    """

    def __init__(
        self,
        size: int = 3,
        *,
        sleep: Callable[[float], object] | None = None,
        settings: Mapping[str, str] | None = None,
        plugins: Iterable[str] = (),
        timeout: float = 90.0,
    ) -> None:
        (mapper_port,) = free_ports(1)
        cookie = random.SystemRandom().randbytes(16).hex()
        # Known to one port mapper only, which is the cluster's own.
        names = tuple(f"greenkombu-{os.getpid()}-{number}@localhost" for number in range(size))
        self.nodes = [
            PrivateRabbitMQ(
                sleep=sleep,
                settings=settings,
                plugins=list(plugins),
                membership=Membership(
                    name, None if name is names[0] else names[0], mapper_port, cookie
                ),
                timeout=timeout,
            )
            for name in names
        ]

    def start(self) -> PrivateRabbitMQCluster:
        """Start the nodes that do not run, and wait until all are together.

        Raises:
            RabbitMQNotInstalledError: no server, or no Erlang, on this machine.
            PrivateBrokerError: a node did not start, or did not find the others; all are gone.
        """
        starting = [node for node in self.nodes if not node.running]
        if not starting:
            return self
        first = starting[0]
        try:
            # Who joins while the first one still makes its tables cannot start.
            first.start()
            for node in starting[1:]:
                node.launch()
            for node in starting[1:]:
                node.wait_ready()
            first.ctl("await_online_nodes", str(len(self.nodes)))
        except BaseException:  # also a Timeout or a kill of the waiting greenlet
            self.close()
            raise
        return self

    def node_of(self, port: int) -> PrivateRabbitMQ:
        """Return the node that listens on a port."""
        for node in self.nodes:
            if node.port == port:
                return node
        raise PrivateBrokerError(f"no node of {self!r} listens on port {port}")

    @property
    def url(self) -> str:
        """The URLs of all nodes, for a connection that tries them in turn."""
        return ";".join(node.url for node in self.nodes)

    def close(self) -> None:
        """End all nodes at once and remove their folders; idempotent."""
        for node in self.nodes:
            node.close()

    def __enter__(self) -> PrivateRabbitMQCluster:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<PrivateRabbitMQCluster {self.nodes!r}>"
