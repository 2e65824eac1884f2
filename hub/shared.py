"""The hubs that everything shares: one per native thread, or per process under `default`.

Kept apart from `hub.loop` so that a `Hub` knows nothing of who else exists.
"""

from __future__ import annotations

from hub._exit import run_at_exit
from hub._log import emit_all
from hub.environment import Environment, get_environment
from hub.errors import HubError
from hub.loop import STOP_TIMEOUT, Hub

__all__ = ["get_hub", "hubs_of"]

#: Seconds that the end of a program may take to send what is still buffered, over all hubs.
EXIT_TIMEOUT = 2.0

# (environment, native thread) -> hub; `default` has one for all threads.
_shared: dict[tuple[str, int], Hub] = {}


def get_hub(environment: Environment | None = None) -> Hub:
    """Return the shared hub of this native thread, or under `default` of the process.

    It is made at first use, and again after a fork or a `close()`.
    """
    env = environment or get_environment()
    key = (env.name, env.thread_id() if env.green else 0)
    hub = _shared.get(key)
    if hub is not None and hub.driver.belongs_here and not hub.closed:
        return hub
    if hub is not None and hub.closed:
        _forget(hub)  # it is being closed at this moment, by another thread
        hub = None
    if env.green:
        _sweep(env, hub)
    made = Hub(environment=env)
    made.background = True
    made.on_end.append(_forget)
    made.thread = env.thread_id() if env.green else Hub.NOBODY
    hub = _shared.setdefault(key, made)
    if hub is not made:
        made.close()  # another thread was faster
        return hub
    run_at_exit(_at_exit)
    if env.green:
        # Now, in its own thread: another one could not start it later.
        hub.ensure_running()
    return hub


def _sweep(env: Environment, stale: Hub | None) -> None:
    """Shut down the hubs of native threads that have ended, which nobody else would."""
    import sys

    if stale is not None:
        # The thread with this number has ended and it was given out again, or it has another
        # green loop now.
        stale.shut_down()
    # Not the dictionary: it has the frame of this very call, which would then hold itself, and with
    # it what all its callers have, until the next collection.
    alive = frozenset(sys._current_frames())
    for (name, thread), hub in list(_shared.items()):
        if name == env.name and thread not in alive:
            hub.shut_down()


def hubs_of(environment: Environment) -> list[Hub]:
    """Return the shared hubs that exist for `environment`."""
    return [hub for hub in list(_shared.values()) if hub.environment is environment]


def _forget(hub: Hub) -> None:
    for key, shared in list(_shared.items()):
        if shared is hub:
            _shared.pop(key, None)


def _at_exit() -> None:
    """Stop the background owners and send what is buffered, within one bound."""
    hubs = list(_shared.values())
    deadlines = [hub.time() + EXIT_TIMEOUT for hub in hubs]
    for hub, deadline in zip(hubs, deadlines, strict=True):
        stopped = hub.driver.stop(STOP_TIMEOUT)
        for member in hub.members:
            member.flush_at_exit(deadline)
        if stopped and hub.has_work():
            _catch_up(hub, deadline)
        # Functions that were registered for the exit before `hub` was imported may still use it.
        hub.driver.unpark()
    emit_all()


def _catch_up(hub: Hub, deadline: float) -> None:
    """Call what was queued until now, which the owner was stopped before.

    Mostly that is a socket whose stream was closed a moment ago, and which the interpreter would
    report as one that nobody closed. What these calls queue themselves is not waited for.
    """
    reached: list[bool] = []
    try:
        hub.call_soon_threadsafe(reached.append, True)
        # Calls that take long end a cycle before all are made.
        while not reached and hub.time() < deadline:
            hub.run_once(0)
    except HubError:
        pass  # a task runs it, or it is another thread's
    hub.driver.stop(STOP_TIMEOUT)  # run_once() may have given it back to its owner
