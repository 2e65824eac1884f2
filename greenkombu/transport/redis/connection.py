"""The connection of the Redis transport: one socket for all of its channels.

Commands of all tasks, pushes (what the server says unasked: changed lists, wakes, broadcasts) and
their replies share one `Wire`.  What comes is handled in the hub: a reply goes to whoever sent the
command, a push to the taps or buffers that it concerns.  No task reads.
"""

from __future__ import annotations

import itertools
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from greenkombu import exceptions
from greenkombu._forks import generation
from greenkombu.deadline import Deadline, remaining
from greenkombu.transport.redis._acks import Acks
from greenkombu.transport.redis._attributes import check_options
from greenkombu.transport.redis._bindings import Bindings
from greenkombu.transport.redis._errors import ReplyError, ServerError, copy_of, to_error
from greenkombu.transport.redis._fanout import Fanout
from greenkombu.transport.redis._held import Held, asked_tokens
from greenkombu.transport.redis._keys import Keys, QueueKeys
from greenkombu.transport.redis._leases import Leases
from greenkombu.transport.redis._replies import Replies
from greenkombu.transport.redis._resp import pack
from greenkombu.transport.redis._restore import Orphans, guard
from greenkombu.transport.redis._scripts import Script
from greenkombu.transport.redis._taps import Tap
from greenkombu.transport.redis._wire import Wire
from greenkombu.transport.virtual import base as virtual
from hub._exit import run_at_exit
from hub.errors import HubError
from hub.shared import get_hub

if TYPE_CHECKING:
    from greenkombu.transport._loop_bridge import LoopBridge
    from greenkombu.transport.redis._options import Settings
    from greenkombu.transport.redis.transport import Transport
    from hub.finalize import Finalizer

__all__ = ["Connection"]

logger = logging.getLogger(__name__)

#: Seconds that `close` may take on a server that does not answer.
CLOSE_SECONDS = 5.0
#: The same for all connections that a program left open at its end.
EXIT_SECONDS = 2.0
#: Numbers that one POP may use for its tokens; more than it can take messages.
NUMBERS = 1024

# What has to be given back at exit.
_open: weakref.WeakSet[Connection] = weakref.WeakSet()


class Connection(virtual.Connection):
    """A connection to a Redis server.

    Args:
        transport: the Redis transport.

    Attributes:
        wire: the socket.
        keys: names of keys on the server.
        tracks: the server tells of changed keys (RESP3 and CLIENT TRACKING); if not, queues are
            polled.
        bridge: to a loop of the program's own, if it is registered with one.
    """

    polls = False
    bridge: LoopBridge | None = None
    wire: Wire

    def __init__(self, transport: Transport, settings: Settings) -> None:
        super().__init__(transport)
        self.redis_transport = transport
        #: Queues that were declared by it; one without messages is nothing on the server.
        self.declared = transport.declared
        options = self.transport_options
        check_options(options)
        self.settings = settings
        self._made_in = generation()
        #: Who puts back what this connection held, if it is lost: connections with the same.
        self.heirs = Orphans.key(self.client)
        self.hub = get_hub()
        self.keys = Keys(options, settings.db)
        self.client_id = os.urandom(8).hex().encode()
        self.token_prefix = self.client_id + b":"
        self.wake_prefix = self.keys.wake_channel("")
        self.tracks = False
        self.polling_interval = float(transport.polling_interval or 1.0)
        self.leases = Leases(self, options)
        self.bindings = Bindings(self)
        self.fanout = Fanout(self)
        self.replies = Replies()
        self._numbers = itertools.count(1)
        # Digests of scripts that the server has had the text of.
        self._sent_scripts: set[bytes] = set()
        self._taps: dict[int, Tap] = {}
        # Keys of one queue for each index that this connection has taken from.
        self._indexes: dict[bytes, QueueKeys] = {}
        self._taps_by_list: dict[bytes, dict[Tap, None]] = {}
        self._hears_wakes = False
        self.acks = Acks(self)
        self._tables: list[dict[bytes, Held]] = []
        # What was asked for and is not answered: the number of the first token; keys, how many.
        self._asked: dict[int, tuple[QueueKeys, int]] = {}
        self._guard: Finalizer | None = None
        self._subscriber: Wire | None = None

    # -- connecting

    def connect(self, timeout: float) -> None:
        """Connect and log in within *timeout* seconds; parks the task.

        Raises:
            ServerError: see `Wire.connect`.
        """
        self.wire = self._open_wire(self.settings, timeout=timeout, **self._ears())
        if self.wire.protocol >= 3:
            self._begin_tracking()
        else:
            self.no_tracking("the connection speaks RESP2")
        run_at_exit(_close_at_exit)
        _open.add(self)
        self._guard = guard(self, self._tables, self._asked)

    def _ears(self) -> dict[str, Callable[[Any], None]]:
        """Return who is told what a wire hears, without keeping this connection alive."""
        me = weakref.WeakMethod(self._pushed)
        lost = weakref.WeakMethod(self._lost)
        return {
            "on_push": lambda push: _call(me, push),
            "on_lost": lambda error: _call(lost, error),
        }

    def _open_wire(self, settings: Settings, **options: Any) -> Wire:
        return Wire.connect(settings, **options)

    def _begin_tracking(self) -> None:
        reply = self.wire.call_many([("CLIENT", "TRACKING", "ON", "OPTIN")], raises=False)[0]
        if isinstance(reply, ReplyError):
            self.no_tracking(reply.message)
        else:
            self.tracks = True

    def no_tracking(self, reason: str) -> None:
        """Poll from now on, because the server (or a proxy) does not tell of changes."""
        self.tracks = False
        self.bindings.forget_all()
        self.redis_transport.polls_because(reason)

    def in_hub(self, function: Callable[[], object]) -> None:
        """Call a function in the hub: now if this is its thread, else soon; never raises its end.

        Args:
            function: not called if the hub has ended, and the connection with it.
        """
        try:
            self.hub.call_here(function)
        except HubError:
            pass

    # -- sending

    def wire_of(self, route: QueueKeys | None) -> Wire:
        """Return the wire to the server that has the keys of a queue."""
        del route
        if self.error is not None:
            raise copy_of(self.error)
        return self.wire

    def call(self, *command: Any, route: QueueKeys | None = None) -> Any:
        """Send a command and wait for its reply; parks the task.

        Args:
            command: its words.
            route: keys of the queue that it is about; None where there is one server.

        Raises:
            CommandError, ServerError, CommandTimeoutError: see `_errors`.
        """
        wire = self.wire_of(route)
        try:
            return wire.call(*command)
        except ServerError as exc:
            self.give_up(exc)
            raise

    def call_many(
        self,
        commands: Sequence[tuple[Any, ...]],
        route: QueueKeys | None = None,
        raises: bool = True,
    ) -> list[Any]:
        """Send commands in one go and wait for all replies; parks the task.

        Args:
            commands: each as the words of `call`.
            route: as in `call`.
            raises: raise the first refusal; else refusals are in the list.
        """
        wire = self.wire_of(route)
        try:
            return wire.call_many(list(commands), raises=raises)
        except ServerError as exc:
            self.give_up(exc)
            raise

    def give_up(self, error: ServerError) -> None:
        """End the connection, if it has not ended: what the server said leaves no other way."""
        if self.error is None:
            self.abort(copy_of(error))

    def call_each(
        self, commands: Sequence[tuple[Any, ...]], routes: Sequence[QueueKeys | None]
    ) -> list[Any]:
        """Send commands for several queues, each to the server of its queue; parks the task."""
        del routes
        return self.call_many(commands)

    def eval(
        self,
        script: Script,
        keys: Sequence[bytes],
        args: Sequence[Any],
        route: QueueKeys | None = None,
    ) -> Any:
        """Run a script and wait for its reply; parks the task."""
        wire = self.wire_of(route)
        command = (*self._name_script(script), len(keys), *keys, *args)
        reply = wire.call_many([command], raises=False)[0]
        if isinstance(reply, ReplyError):
            if reply.code != "NOSCRIPT":
                error = to_error(reply, server=wire.peer, what="a script")
                if isinstance(error, ServerError):
                    self.give_up(error)
                raise error
            return self.call("EVAL", script.text, len(keys), *keys, *args, route=route)
        return reply

    def send(
        self,
        data: bytes,
        replies: int,
        done: Callable[[Any], object] | None = None,
        route: QueueKeys | None = None,
    ) -> None:
        """Send packed commands; never waits or raises.

        Args:
            data: the commands.
            replies: how many there will be.
            done: called in the hub with the list of replies, or with an error that ended the
                connection.
            route: as in `call`.
        """
        done = done or _ignore
        try:
            self.wire_of(route).send(data, replies, done)
        except (exceptions.KombuError, OSError) as exc:
            done(exc)

    def run(
        self,
        script: Script,
        keys: Sequence[bytes],
        args: Iterable[Any],
        done: Callable[[Any], object] | None = None,
        route: QueueKeys | None = None,
    ) -> None:
        """Run a script; never waits or raises.

        Args:
            script: the script.
            keys, args: its KEYS and ARGV.
            done: called in the hub with the reply, or with an error: what the server said, or what
                ended the connection.
            route: as in `call`.
        """
        words = (len(keys), *keys, *args)

        def answered(replies: Any) -> None:
            reply = replies if isinstance(replies, BaseException) else replies[0]
            if isinstance(reply, ReplyError):
                if reply.code == "NOSCRIPT":
                    self.send(pack("EVAL", script.text, *words), 1, answered, route)
                    return
                reply = self.refused(reply, "a script")
            if done is not None:
                done(reply)

        self.send(pack(*self._name_script(script), *words), 1, answered, route)

    def _name_script(self, script: Script) -> tuple[str, bytes]:
        """Return how to run a script: the first time by its text.

        A server that did not know the digest would run it after what was sent meanwhile, and so
        put a message back after another one was taken.
        """
        digest = script.digest
        if digest in self._sent_scripts:
            return "EVALSHA", digest
        self._sent_scripts.add(digest)
        return "EVAL", script.text

    def refused(self, reply: ReplyError, what: str) -> BaseException:
        """Make the error of a reply that no task waits for; it may end the connection."""
        error = to_error(reply, server=self.wire.peer, what=what)
        if isinstance(error, ServerError):
            self.abort(error)
        else:
            self.hub.log_later(logger, logging.WARNING, "%s", error)
        return error

    @property
    def subscriber(self) -> Wire:
        """The wire for subscriptions, and their messages; see `open_subscriber`."""
        return self.wire if self._subscriber is None else self._subscriber

    def open_subscriber(self) -> None:
        """Make sure that there is a wire for subscriptions; parks the task if it has to be opened.

        With RESP2 a subscriber cannot send other commands, so it is one of its own.
        """
        if self.wire.protocol >= 3 or self._subscriber is not None:
            return
        ears = self._ears()
        unwanted: list[Wire] = []

        def lost(error: BaseException) -> None:
            if not unwanted:
                ears["on_lost"](error)

        # To the same server, whom `connect` has found.
        wire = Wire.connect(
            self.settings,
            timeout=self.settings.connect_timeout,
            pubsub=True,
            on_push=ears["on_push"],
            on_lost=lost,
        )
        if self._subscriber is None and self.error is None:
            self._subscriber = wire
        else:
            # Another task was faster, or the connection has ended.
            unwanted.append(wire)
            wire.abort()

    # -- pushes

    def _pushed(self, push: list[Any]) -> None:
        """Take what the server said unasked; in the hub."""
        kind = push[0]
        if kind == b"invalidate":
            if push[1] is None:  # the database was emptied
                self.bindings.forget_all()
                for tap in list(self.leases.watching):
                    tap.nudge()
            else:
                for key in push[1]:
                    self._changed(key)
        elif kind in (b"message", b"pmessage"):
            channel, data = push[-2:]
            if channel == self.wake_prefix + self.client_id:
                woken = self._taps.get(int(data))
                if woken is not None:
                    woken.nudge(woken=True)
            else:
                self.fanout.received(push[1], data)

    def _changed(self, key: bytes) -> None:
        taps = self._taps_by_list.get(key)
        if taps is None:
            self.bindings.forget(key)
        else:
            # The parked ones, of other channels, are not meant.
            for tap in list(taps):
                if tap.watching:
                    tap.changed()

    def hear_wakes(self, route: QueueKeys) -> None:
        """Subscribe to the channel on which this client is woken, once."""
        if not self._hears_wakes:
            self._hears_wakes = True
            self.send(
                pack("SUBSCRIBE", self.wake_prefix + self.client_id), 0, self._subscribed, route
            )

    def _subscribed(self, refused: Any) -> None:
        if isinstance(refused, list) and refused:
            self.no_tracking(refused[0].message)

    # -- taps

    def claim_numbers(self) -> int:
        """Return the first of some numbers that nothing else of this connection has."""
        return next(self._numbers) * NUMBERS

    def ask(self, keys: QueueKeys, count: int) -> int:
        """Note that messages of a queue are asked for, and may be taken before the reply is here.

        Args:
            keys: of the queue.
            count: how many there may be.

        Returns:
            The number of the first one's token.
        """
        first = self.claim_numbers()
        self._asked[first] = (keys, count)
        return first

    def answered(self, first: int, reply: Any) -> None:
        """Note that what `ask` noted has a reply; if that says that it was lost, leave it."""
        asked = self._asked.pop(first, None)
        if asked is not None and isinstance(reply, ServerError):
            self.leave(asked_tokens(self.token_prefix, {first: asked}))

    def add_tap(self, tap: Tap) -> None:
        """Have a tap told of changes of its queue."""
        self._taps[tap.number] = tap
        for key in tap.keys.lists:
            self._taps_by_list.setdefault(key, {})[tap] = None
        self.uses(tap.keys)

    def uses(self, keys: QueueKeys) -> None:
        """Note that messages of a queue are taken: leases of its index are to be seen to."""
        if keys.registered not in self._indexes:
            self._indexes[keys.registered] = keys
            self.in_hub(self.leases.begin)

    def remove_tap(self, tap: Tap) -> None:
        """Undo `add_tap`."""
        self._taps.pop(tap.number, None)
        for key in tap.keys.lists:
            taps = self._taps_by_list.get(key)
            if taps is not None:
                taps.pop(tap, None)
                if not taps:
                    self._taps_by_list.pop(key, None)

    def watch(self, tap: Tap) -> None:
        """Renew a watcher's lease from now on."""
        self.leases.watching[tap] = None

    def unwatch(self, tap: Tap) -> None:
        """Stop that."""
        self.leases.watching.pop(tap, None)

    def group(self, taps: list[Tap]) -> list[list[Tap]]:
        """Divide taps into those whose keys one script can have."""
        return [taps]

    def indexes(self) -> list[QueueKeys]:
        """Return the keys of one queue for each index from which this connection has taken."""
        return list(self._indexes.values())

    def taps_of(self, keys: QueueKeys) -> list[Tap]:
        """Return the taps of a queue, of all channels."""
        return list(self._taps_by_list.get(keys.lists[0], ()))

    @property
    def taps(self) -> int:
        """How many queues are consumed, counted for each channel."""
        return len(self._taps)

    @property
    def parked(self) -> bool:
        """Whether it has consumers, and all of them are parked."""
        taps = list(self._taps.values())
        return bool(taps) and self.tracks and all(tap.parked for tap in taps)

    def held(self) -> list[Held]:
        """Return the unacked messages of this client."""
        return [held for table in list(self._tables) for held in list(table.values())]

    def add_tokens(self, table: dict[bytes, Held]) -> None:
        """Note the unacked messages of a channel."""
        self._tables.append(table)

    def remove_tokens(self, table: dict[bytes, Held]) -> None:
        """Undo `add_tokens`."""
        self._tables[:] = [each for each in self._tables if each is not table]

    def leave(self, messages: Sequence[tuple[QueueKeys, list[bytes]]]) -> None:
        """Leave messages to the next connection of this process, which puts them back.

        Args:
            messages: keys of a queue, and tokens of its messages; some may never have been taken.
        """
        Orphans.leave(self.heirs, messages)

    # -- the end

    def _lost(self, error: BaseException) -> None:
        self.abort(error)

    def abort(self, error: BaseException | None = None) -> None:
        """Declare the connection dead at once; see the base class.

        What its consumers held goes back when this process connects again, or after the
        visibility timeout.
        """
        own = self._made_in == generation()
        if self.error is None and own:
            left = [(one.keys, [one.token]) for one in self.held()]
            self.leave(left)
            self.leave(asked_tokens(self.token_prefix, self._asked))
        super().abort(error)
        if own:
            self.acks.flush()  # which no longer sends: they are left to the next one as well
        self.leases.end()
        if self._guard is not None:
            self._guard.detach()
        for wire in (self.__dict__.get("wire"), self._subscriber):
            if wire is not None:
                wire.abort(error)

    def close(self, timeout: float | None = None) -> None:
        """Give back what is unsettled, send what waits, and close.

        Args:
            timeout: seconds for all of it; None takes `CLOSE_SECONDS`.
        """
        if self.error is not None:
            super().close(timeout)
            return
        with Deadline(CLOSE_SECONDS if timeout is None else timeout):
            try:
                for channel in list(self.channels.values()):
                    channel.close()
                self.leases.end()
                self.finish()
            finally:
                wire = self.wire
                super().close(timeout)
                if self._subscriber is not None:
                    self._subscriber.abort()
                wire.close(remaining(CLOSE_SECONDS) or 0.0)

    def finish(self) -> None:
        """Send acknowledgements, and wait until everything that was sent has been answered.

        A POP that was on its way has been answered then, and what it took was put back.
        """
        done = self.hub.environment.waiter()
        self.in_hub(done.wake)
        done.wait(remaining(CLOSE_SECONDS))
        self.acks.flush()
        self.sync()
        self.sync()

    def sync(self) -> None:
        """Wait until the server has answered what was sent up to now; parks the task."""
        self.call("PING")

    def __repr__(self) -> str:
        state = "connected" if self.connected else f"dead: {self.error!r}"
        return (
            f"<{type(self).__name__} to {self.settings.peer}: {state}, {len(self.channels)}"
            f" channels, {len(self._taps)} queues, {len(self.held())} unacked>"
        )


def _call(method: weakref.WeakMethod[Any], argument: Any) -> None:
    bound = method()
    if bound is not None:
        bound(argument)


def _ignore(replies: Any) -> None:
    del replies


def _close_at_exit() -> None:
    until = monotonic() + EXIT_SECONDS
    for connection in list(_open):
        if connection.error is None:
            try:
                connection.close(max(until - monotonic(), 0.05))
            except Exception as exc:
                logger.debug("closing %r at exit: %r", connection, exc)
