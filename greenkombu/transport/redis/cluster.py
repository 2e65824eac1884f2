"""Redis Cluster: queues are spread over several masters.

``redis+cluster://:password@one:6379;redis+cluster://two:6379`` (with TLS ``rediss+cluster://``)
names some of the servers; the others are found.  Kombu has no such transport, so there is no layout
to keep: everything that belongs to one queue has the queue's name in braces, and so is on one
server, where scripts can do what they do on a single one.  What is unacked is kept for each queue.
The bindings of an exchange lie wherever its name says; broadcasts go everywhere, as Redis does it.

A connection opens a wire to a server when it first has to do with it (`_nodes`).  Its first one,
to any server, takes what concerns no key: broadcasts, subscriptions.

*A slot moves.*  Commands follow it, and consumers that wait look at its new owner, within half a
watcher's lease at most; while it is under way, scripts wait.

*A server is lost.*  Then the whole connection ends, at once: what consumers held there is on its
replica, and goes back when they are connected again, as after every loss.  Until the replica has
taken over, commands wait for `PATIENCE` seconds, and then it is for those who try again.  A
connection that had nothing to do with that server stays as it is.  What the server had accepted and
not passed on to its replica is lost: Redis replicates without waiting.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Any

from greenkombu.deadline import remaining
from greenkombu.transport.redis._bindings import Bindings
from greenkombu.transport.redis._client import make_cluster_client
from greenkombu.transport.redis._errors import (
    ArgumentError,
    CommandTimeoutError,
    LoginRefusedError,
    ReplyError,
    ServerError,
    copy_of,
    to_error,
)
from greenkombu.transport.redis._keys import Keys
from greenkombu.transport.redis._nodes import Nodes, Unit
from greenkombu.transport.redis._options import PORT
from greenkombu.transport.redis._resp import pack, pack_many
from greenkombu.transport.redis._seeds import SeededTransport
from greenkombu.transport.redis._slots import Address, SlotMap, key_of, slot_of
from greenkombu.transport.redis._taps import State
from greenkombu.transport.redis.channel import Channel
from greenkombu.transport.redis.connection import Connection
from hub.environment import check_may_wait, get_environment

if TYPE_CHECKING:
    from greenkombu.transport.redis._keys import QueueKeys
    from greenkombu.transport.redis._options import Settings
    from greenkombu.transport.redis._scripts import Script
    from greenkombu.transport.redis._taps import Tap
    from greenkombu.transport.redis._wire import Wire
    from greenkombu.transport.virtual.tables import BindingTable

__all__ = ["ClusterChannel", "ClusterConnection", "ClusterSSLTransport", "ClusterTransport"]

#: Commands that go together, and their slot; None is any server.
_Part = tuple[list[tuple[Any, ...]], "int | None"]

#: Servers among which the time for connecting is divided, at most.
SHARES = 4


class ClusterChannel(Channel):
    """A channel to a cluster."""

    redis: ClusterConnection

    @property
    def client(self) -> Any:
        """A `redis.RedisCluster` for the program's own commands, made when it is first used.

        `global_keyprefix` is for the program to put before its keys.
        """
        if self._client is None:
            self._client = make_cluster_client(self.redis.settings)
        return self._client


class _ClusterBindings(Bindings):
    """Tables of exchanges that lie on other servers than the queues.

    That a message was accepted by the server of a queue says nothing about what the server of the
    exchange has told meanwhile. So that one is asked as well, when all of a batch was accepted.
    """

    _connection: ClusterConnection

    def __init__(self, connection: ClusterConnection) -> None:
        super().__init__(connection)
        # How many messages were accepted when a server of an exchange was asked last.
        self._asked: dict[bytes, int] = {}

    def holds(self, exchange: str, table: BindingTable) -> bool:
        """Tell whether a table is still that of its exchange; parks the task."""
        connection = self._connection
        if connection.tracks:
            key = connection.keys.binding(exchange)
            accepted = connection.accepted
            if self._asked.get(key) != accepted:
                connection.call("EXISTS", key)
                self._asked[key] = accepted
        return super().holds(exchange, table)

    def still_holds(self, exchange: str, table: BindingTable) -> bool:
        """Tell the same when nothing was sent; parks the task."""
        self._asked.pop(self._connection.keys.binding(exchange), None)
        return self.holds(exchange, table)


class ClusterConnection(Connection):
    """A connection to a Redis Cluster.

    Attributes:
        nodes: its servers.
        accepted: how many messages were accepted; grows, and need not be exact.
    """

    redis_transport: ClusterTransport

    def __init__(self, transport: ClusterTransport, settings: Settings) -> None:
        super().__init__(transport, settings)
        if settings.db:
            raise ArgumentError(
                f"a Redis Cluster has database 0 only, not {settings.db}: leave the number out of"
                " the URL"
            )
        self.keys = Keys(self.transport_options, tagged=True)
        _check_names(self.keys)
        self.wake_prefix = self.keys.wake_channel("")
        self.bindings = _ClusterBindings(self)
        self.nodes = Nodes(self)
        self.accepted = 0

    # -- connecting

    def _open_wire(self, settings: Settings, **options: Any) -> Wire:
        until = monotonic() + options.pop("timeout")
        self.nodes.options = options
        transport = self.redis_transport
        candidates = transport.candidates()
        failure: Exception | None = None
        for number, address in enumerate(candidates):
            share = max(until - monotonic(), 0.0) / min(len(candidates) - number, SHARES)
            found = replace(settings, address=address)
            try:
                wire = super()._open_wire(found, timeout=share, **options)
                self.nodes.slots = self._ask_for_map(wire, address, until)
            except LoginRefusedError:
                raise
            except (CommandTimeoutError, ServerError) as exc:
                failure = exc
                continue
            self.settings = found
            transport.found(address, self.nodes.slots.addresses)
            return wire
        assert failure is not None
        raise failure

    def _ask_for_map(self, wire: Wire, address: Address, until: float) -> SlotMap:
        try:
            slots, info = wire.call_many(
                [("CLUSTER", "SLOTS"), ("CLUSTER", "NODES")], max(until - monotonic(), 0.0), False
            )
            for reply in (slots, info):
                if isinstance(reply, ReplyError):
                    if "cluster support disabled" in reply.message:
                        raise ArgumentError(
                            f"Redis server {wire.peer} belongs to no cluster: use redis://"
                        )
                    raise to_error(reply, server=wire.peer, what="CLUSTER SLOTS")
        except BaseException:
            wire.abort()
            raise
        made = SlotMap.parse(slots, address[0])
        self.nodes.adopt(_myself(info, made, address), wire)
        return made

    # -- sending

    def _submit(
        self,
        data: bytes,
        replies: int,
        done: Callable[[Any], object],
        slot: int | None,
        seconds: float,
    ) -> Unit:
        unit = Unit(data, replies, done, slot, seconds=seconds)
        self.nodes.submit(unit)
        return unit

    def call(self, *command: Any, route: QueueKeys | None = None) -> Any:
        """Send a command and wait for its reply; parks the task."""
        [reply] = self.call_many([command], route)
        if command[0] == "LPUSH":
            self.accepted += 1
        return reply

    def call_many(
        self,
        commands: Sequence[tuple[Any, ...]],
        route: QueueKeys | None = None,
        raises: bool = True,
    ) -> list[Any]:
        """Send commands, each to the server of its key, and wait for all; parks the task.

        Args:
            commands: each as the words of `call`. Those without a key go where the next one goes.
                What goes to one server in a row may be sent again, if a part of it was refused
                because a slot has moved.
            route: where all of them go.
            raises: raise the first refusal; else refusals are in the list.
        """
        if not commands:
            return []
        if route is None:
            return self._call_parts(_divide(commands), raises)
        return self._call_parts([(list(commands), slot_of(route.unacked))], raises)

    def call_each(
        self, commands: Sequence[tuple[Any, ...]], routes: Sequence[QueueKeys | None]
    ) -> list[Any]:
        """Send commands for several queues, each to the server of its queue; parks the task."""
        parts: list[_Part] = [
            ([command], None if route is None else slot_of(route.unacked))
            for command, route in zip(commands, routes, strict=True)
        ]
        replies = self._call_parts(parts, True)
        self.accepted += 1
        return replies

    def _call_parts(self, parts: Sequence[_Part], raises: bool) -> list[Any]:
        environment = get_environment()
        check_may_wait(environment.current())
        if self.error is not None:
            raise copy_of(self.error)
        seconds = self.settings.socket_timeout
        until = monotonic() + (remaining(seconds) or 0.0)
        packed = [pack_many(commands) for commands, _ in parts]
        for _, slot in parts:
            wire = self.nodes.wire_to(slot) or self.wire
            if wire.stream is not None and wire.stream.above_high_water:
                wire.room(max(until - monotonic(), 0.0))
        bound = max(until - monotonic(), 0.0)
        waiter = environment.waiter()
        results: list[Any] = [None] * len(parts)
        awaited = [None] * len(parts)

        def come(number: int, result: Any) -> None:
            results[number] = result
            awaited.pop()
            if not awaited:
                waiter.wake()

        units = [
            self._submit(data, len(commands), _Numbered(come, number), slot, bound)
            for number, ((commands, slot), data) in enumerate(zip(parts, packed, strict=True))
        ]
        waiter.wait(max(until - monotonic(), 0.0))
        replies: list[Any] = []
        for (commands, _), unit, result in zip(parts, units, results, strict=True):
            name = _name(commands)
            if result is None:
                raise CommandTimeoutError(
                    f"Redis Cluster at {unit.peer or self.wire.peer} did not answer {name} within"
                    f" {seconds:g} s; it may still take effect (see the transport option"
                    " socket_timeout)"
                )
            if isinstance(result, BaseException):
                raise copy_of(result)
            replies += result
            for reply in result if raises else ():
                if isinstance(reply, ReplyError):
                    raise self._mapped(reply, unit, name)
        return replies

    def _mapped(self, reply: ReplyError, unit: Unit, name: str) -> Exception:
        error = to_error(reply, server=unit.peer, what=name)
        if isinstance(error, ServerError):
            self.give_up(error)
        return error

    def eval(
        self,
        script: Script,
        keys: Sequence[bytes],
        args: Sequence[Any],
        route: QueueKeys | None = None,
    ) -> Any:
        """Run a script and wait for its reply; parks the task."""
        words = (len(keys), *keys, *args)
        # As it does not say whether the server has it, the whole is sent in both cases.
        return self.call_many(
            [("SCRIPT", "LOAD", script.text), ("EVALSHA", script.digest, *words)], route
        )[1]

    def send(
        self,
        data: bytes,
        replies: int,
        done: Callable[[Any], object] | None = None,
        route: QueueKeys | None = None,
    ) -> None:
        """Send packed commands to the server of a queue; never waits or raises."""
        slot = None if route is None else slot_of(route.unacked)
        self._submit(data, replies, done or _ignore, slot, self.settings.socket_timeout)

    def hear_wakes(self, route: QueueKeys) -> None:
        """Subscribe to the channel on which this client is woken, once on each server.

        A script learns how many have heard it only of those who subscribe where it runs.
        """
        del route
        if not self._hears_wakes:
            self._hears_wakes = True
            self.nodes.greet_with(pack("SUBSCRIBE", self.wake_prefix + self.client_id))

    def group(self, taps: list[Tap]) -> list[list[Tap]]:
        """Divide taps into those whose keys one script can have."""
        groups: dict[int, list[Tap]] = {}
        for tap in taps:
            groups.setdefault(slot_of(tap.keys.unacked), []).append(tap)
        return list(groups.values())

    def slots_moved(self, moved: Callable[[int], bool]) -> None:
        """Look again where slots are now; in the hub."""
        # A table that was empty is on no server that could tell of a change.
        self.bindings.forget_all()
        for tap in list(self._taps.values()):
            if tap.state is State.WAITING and moved(slot_of(tap.keys.unacked)):
                tap.nudge()

    # -- the end

    def sync(self) -> None:
        """Wait until all that was sent up to now has been answered; parks the task."""
        if self.error is None:
            self.nodes.sync(self.settings.socket_timeout)
        if self.error is not None:
            raise copy_of(self.error)

    def abort(self, error: BaseException | None = None) -> None:
        """Declare the connection dead at once; see the base class."""
        if error is not None and self.error is None:
            self.redis_transport.lost()
        super().abort(error)
        self.nodes.abort(self.error)


class _Numbered:
    """One of several that a task waits for."""

    __slots__ = ("_come", "_number")

    def __init__(self, come: Callable[[int, Any], object], number: int) -> None:
        self._come = come
        self._number = number

    def __call__(self, result: Any) -> None:
        self._come(self._number, result)


def _divide(commands: Sequence[tuple[Any, ...]]) -> list[_Part]:
    """Divide commands into runs for one server."""
    parts: list[_Part] = []
    keyless: list[tuple[Any, ...]] = []
    for command in commands:
        key = key_of(command)
        if key is None:
            keyless.append(command)
            continue
        slot = slot_of(key)
        if parts and parts[-1][1] == slot:
            parts[-1][0].extend([*keyless, command])
        else:
            parts.append(([*keyless, command], slot))
        keyless = []
    if keyless:
        parts.append((keyless, None))
    return parts


def _name(commands: list[tuple[Any, ...]]) -> str:
    name = commands[-1][0]
    return name.decode() if isinstance(name, bytes) else str(name)


def _myself(nodes: bytes, slots: SlotMap, address: Address) -> Address:
    """Return the address by which the others know the server that was asked.

    Args:
        nodes: the reply to CLUSTER NODES.
        slots: the map.
        address: by which we know it.
    """
    if address in slots.addresses:
        return address
    for line in nodes.decode(errors="replace").splitlines():
        fields = line.split(" ")
        if len(fields) > 2 and "myself" in fields[2]:
            host, _, port = fields[1].partition("@")[0].rpartition(":")
            if port.isdigit() and (host, int(port)) in slots.addresses:
                return host, int(port)
    return address


def _check_names(keys: Keys) -> None:
    """Raise if options make names of which not all that belongs to a queue is in one slot."""
    queue = keys.of("queue")
    names = [*queue.lists, queue.unacked, queue.registered, queue.mutex, queue.watchers]
    bindings = [keys.binding("exchange"), keys.permanent_binding("exchange")]
    for each in ([*names, queue.parked], bindings):
        if len({slot_of(name) for name in each}) > 1:
            raise ArgumentError(
                "names of keys with braces do not go with a Redis Cluster: look at global_keyprefix"
                " and the other transport options that change names"
            )


class ClusterTransport(SeededTransport):
    """The Redis transport for a Redis Cluster: ``redis+cluster://``."""

    Channel = ClusterChannel
    Connection = ClusterConnection

    default_port = PORT

    def __init__(self, client: Any, **kwargs: Any) -> None:
        super().__init__(client, **kwargs)
        self._preferred: Address | None = None
        self._known: list[Address] = []

    def candidates(self) -> list[Address]:
        """Return the servers in the order in which they are to be tried."""
        preferred = [] if self._preferred is None else [self._preferred]
        return list(dict.fromkeys([*preferred, *self.seeds(), *self._known]))

    def found(self, address: Address, known: list[Address]) -> None:
        """Note which server has answered, and which there are."""
        self._preferred = address
        self._known = random.sample(known, len(known))

    def lost(self) -> None:
        """Begin with another server the next time, perhaps."""
        self._preferred = None


class ClusterSSLTransport(ClusterTransport):
    """The same over TLS: ``rediss+cluster://``."""

    tls = True


def _ignore(replies: Any) -> None:
    del replies
