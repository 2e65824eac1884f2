"""Start and torment a RabbitMQ server of one's own in a temporary folder.

For tests and for ``greenkombu demo --broker rabbitmq``; never for production. The server runs as
the calling user, listens on loopback only, has its own node name, ports, Erlang port mapper (epmd)
and data, and so lives beside the machine's own RabbitMQ and beside other private ones without
touching them. A guard process (`greenkombu.utils._guard`) ends it when this process ends, however
that happens.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

from greenkombu.utils._private_server import (
    PrivateBrokerError,
    PrivateServer,
    TLSFiles,
    free_ports,
    wait_exit,
)

__all__ = [
    "MANAGEMENT",
    "Membership",
    "PrivateBrokerError",
    "PrivateRabbitMQ",
    "RabbitMQNotInstalledError",
    "TLSFiles",
    "find_rabbitmq",
    "free_ports",
]

#: Where the server's own scripts are. The ones on PATH come last: Debian's switch to the user
#: `rabbitmq`, whose environment is the system service's.
SCRIPT_FOLDERS = (
    "/usr/lib/rabbitmq/bin",
    "/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin",
    "/opt/homebrew/opt/rabbitmq/sbin",
    "/usr/local/opt/rabbitmq/sbin",
    "/opt/rabbitmq/sbin",
)

#: Where epmd is when it is not on PATH.
EPMD_PLACES = (
    "/usr/lib/erlang/bin/epmd",
    "/usr/lib/erlang/erts-*/bin/epmd",
    "/usr/lib64/erlang/erts-*/bin/epmd",
    "/usr/local/lib/erlang/erts-*/bin/epmd",
    "/opt/homebrew/lib/erlang/erts-*/bin/epmd",
)


class RabbitMQNotInstalledError(PrivateBrokerError):
    """This machine has no RabbitMQ server that could be started."""


@dataclass(frozen=True)
class Membership:
    """The part of one node in a cluster; see `greenkombu.utils.private_rabbitmq_cluster`.

    Args:
        node: its name.
        peer: the node that it joins at its first start; None begins the cluster.
        mapper_port: of the port mapper that they share; who finds none starts it.
        cookie: the secret that they share.
    """

    node: str
    peer: str | None
    mapper_port: int
    cookie: str


def find_rabbitmq() -> Path | None:
    """Return the folder of `rabbitmq-server` and `rabbitmqctl`, None if there is none."""
    import glob
    import shutil

    for pattern in SCRIPT_FOLDERS:
        for name in sorted(glob.glob(pattern), reverse=True):
            if os.access(os.path.join(name, "rabbitmq-server"), os.X_OK):
                return Path(name)
    found = shutil.which("rabbitmq-server")
    return None if found is None else Path(found).parent


#: The plugin with the HTTP interface.
MANAGEMENT = "rabbitmq_management"


class PrivateRabbitMQ(PrivateServer):
    """A RabbitMQ server in a temporary folder, started by `start()` and removed by `close()`.

    Args:
        sleep: see `PrivateServer`.
        memory_limit: the server blocks publishers above it, in RabbitMQ's notation.
        settings: further lines for `rabbitmq.conf`.
        plugins: names of plugins to enable. With rabbitmq_management, virtual hosts are made
            through its HTTP interface: milliseconds, where `rabbitmqctl` takes a second or more.
        tls: also listen for TLS with these files.
        membership: the cluster to form, or to join, at the first start.
        timeout: seconds that each step (start, stop, a control command) may take.

    Raises:
        RabbitMQNotInstalledError: by `start()`: no server, or no Erlang, on this machine.
    """

    PORT_TAKEN: ClassVar = "eaddrinuse"

    def __init__(
        self,
        *,
        sleep: Callable[[float], object] | None = None,
        memory_limit: str = "512MB",
        settings: Mapping[str, str] | None = None,
        plugins: Iterable[str] = (),
        tls: TLSFiles | None = None,
        membership: Membership | None = None,
        timeout: float = 60.0,
    ) -> None:
        super().__init__("rabbitmq", sleep=sleep, timeout=timeout)
        self._membership = membership
        self.tls = tls
        self.tls_port = 0
        self.management_port = 0
        self.node = ""
        self._settings = {"vm_memory_high_watermark.absolute": memory_limit, **(settings or {})}
        self._plugins = list(plugins)

    # -- life ------------------------------------------------------------------------------------

    def _launch(self) -> None:
        scripts = find_rabbitmq()
        epmd = _find_epmd()
        if scripts is None or epmd is None:
            what = "RabbitMQ server" if scripts is None else "Erlang port mapper (epmd)"
            raise RabbitMQNotInstalledError(
                f"no {what} found; install it, for example: apt-get install rabbitmq-server"
            )
        if not self.port:
            self._choose_place()
        (self.folder / "pid").unlink(missing_ok=True)
        environment = self._environment()
        if not _accepts(self._epmd_port):
            # A node that finds no port mapper starts one that outlives it.
            mapper = [epmd, "-port", str(self._epmd_port), "-address", "127.0.0.1"]
            self._state.start("epmd", mapper, environment)
            self._await("epmd", lambda: _accepts(self._epmd_port))
        self._state.start("server", [str(scripts / "rabbitmq-server")], environment)

    def wait_ready(self) -> None:
        """Wait until a launched server accepts connections; raises as `start`."""
        self._await("server", lambda: _speaks_amqp(self.port))
        if self.tls is not None and self.tls.external_user is not None:
            self._add_external_user(self.tls.external_user)

    def __repr__(self) -> str:
        node = self.node or "never started"
        return f"<PrivateRabbitMQ {node} port={self.port} {self._state_name()}>"

    # -- facts -----------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The URL of the default virtual host."""
        return self.vhost_url("/")

    def vhost_url(self, vhost: str, *, tls: bool = False) -> str:
        """Return the URL of a virtual host, with the user that every new server has."""
        scheme, port = ("amqps", self.tls_port) if tls else ("amqp", self.port)
        return f"{scheme}://guest:guest@127.0.0.1:{port}/{quote(vhost, safe='')}"

    # -- faults ----------------------------------------------------------------------------------

    def stop_app(self) -> None:
        """Switch the broker off while its node stays up: connections are closed with 320."""
        self.ctl("stop_app")

    def start_app(self) -> None:
        """Switch the broker on again and wait until it accepts."""
        self.ctl("start_app")
        self.wait_ready()

    def close_all_connections(self, reason: str = "closed by a test") -> None:
        """Make the server close every connection with 320 CONNECTION_FORCED."""
        self.ctl("close_all_connections", reason)

    def block(self) -> None:
        """Raise the memory alarm: publishing connections get Connection.Blocked."""
        self.ctl("set_vm_memory_high_watermark", "absolute", "1")

    def unblock(self) -> None:
        """End the memory alarm."""
        limit = self._settings["vm_memory_high_watermark.absolute"]
        self.ctl("set_vm_memory_high_watermark", "absolute", limit)

    # -- control ---------------------------------------------------------------------------------

    def add_vhost(self, name: str) -> str:
        """Create a virtual host that the default user may use, and return its URL."""
        if self.management_port:
            # Whoever makes one over HTTP may use it.
            self.manage("PUT", f"/api/vhosts/{quote(name, safe='')}")
        else:
            self.ctl("add_vhost", name)
            self.ctl("set_permissions", "-p", name, "guest", ".*", ".*", ".*")
        return self.vhost_url(name)

    def delete_vhost(self, name: str) -> None:
        """Remove a virtual host with all that is in it; its connections are closed."""
        if self.management_port:
            self.manage("DELETE", f"/api/vhosts/{quote(name, safe='')}")
        else:
            self.ctl("delete_vhost", name)

    def manage(self, method: str, path: str) -> Any:
        """Send one request to the management plugin, which has to be among `plugins`.

        Args:
            method: "GET", "PUT", "DELETE".
            path: from "/api/" on, as in the HTTP API's reference.

        Returns:
            The answer, decoded; None if it is empty.

        Raises:
            PrivateBrokerError: it answered with an error, or not at all.
        """
        import base64
        import http.client
        import json

        deadline = time.monotonic() + self.timeout
        headers = {"Authorization": "Basic " + base64.b64encode(b"guest:guest").decode()}
        while True:
            connection = http.client.HTTPConnection(
                "127.0.0.1", self.management_port, timeout=self.timeout
            )
            try:
                connection.request(method, path, headers=headers)
                response = connection.getresponse()
                status, body = response.status, response.read()
            except ConnectionError as error:
                # The plugin begins to listen a moment after the server does.
                if time.monotonic() > deadline or not self.running:
                    raise PrivateBrokerError(f"{method} {path}: {error}") from error
                self._sleep(0.05)
                continue
            finally:
                connection.close()
            if status >= 300:
                raise PrivateBrokerError(f"{method} {path}: HTTP status {status}")
            return json.loads(body) if body else None

    def ctl(self, *arguments: str, timeout: float | None = None) -> str:
        """Run `rabbitmqctl` for this server.

        Args:
            arguments: the command and its arguments.
            timeout: seconds; None takes the server's own.

        Returns:
            What the command printed on its standard output.

        Raises:
            PrivateBrokerError: it failed or took too long; the text holds what it printed.
        """
        import subprocess
        import tempfile

        scripts = find_rabbitmq()
        if scripts is None or not self.running:
            raise PrivateBrokerError(f"rabbitmqctl {arguments[0]}: {self!r} does not run")
        command = [str(scripts / "rabbitmqctl"), "-q", "-n", self.node, *arguments]
        # Files and not pipes: nothing has to be read while it runs, so waiting is one poll loop.
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=self._environment(),
                cwd=self.folder,
                start_new_session=True,
            )
            try:
                limit = self.timeout if timeout is None else timeout
                done = wait_exit(process, limit, self._sleep)
            except BaseException:  # a Timeout or a kill of the waiting greenlet
                wait_exit(process, 0, self._sleep)
                raise
            output.seek(0)
            errors.seek(0)
            printed = output.read().decode(errors="replace")
            complaint = errors.read().decode(errors="replace").strip()
        if not done or process.returncode != 0:
            how = f"status {process.returncode}" if done else "took too long and was killed"
            raise PrivateBrokerError(
                f"rabbitmqctl {' '.join(arguments)}: {how}: {complaint or printed.strip()}"
            )
        return printed

    # -- inside ----------------------------------------------------------------------------------

    def _choose_place(self) -> None:
        self._state.make_folder()
        amqp, distribution, mapper, tls, management = free_ports(5)
        self.port, self._distribution_port, self._epmd_port = amqp, distribution, mapper
        self.tls_port = tls if self.tls is not None else 0
        self.management_port = management if MANAGEMENT in self._plugins else 0
        # localhost and not the host's name: that may resolve to another interface, or to nothing.
        self.node = f"greenkombu-{os.getpid()}-{amqp}@localhost"
        if self._membership is not None:
            self.node, self._epmd_port = self._membership.node, self._membership.mapper_port
            cookie = self.folder / ".erlang.cookie"
            cookie.unlink(missing_ok=True)
            cookie.write_text(self._membership.cookie)
            cookie.chmod(0o400)  # Erlang accepts no other mode
        (self.folder / "rabbitmq.conf").write_text(self._configuration())
        plugins = list(self._plugins)
        if self.tls is not None and self.tls.external_user is not None:
            plugins.append("rabbitmq_auth_mechanism_ssl")
        (self.folder / "enabled_plugins").write_text(f"[{','.join(plugins)}].\n")

    def _configuration(self) -> str:
        lines = {
            "listeners.tcp.1": f"127.0.0.1:{self.port}",
            "log.file": "false",
            "log.console": "true",
            "disk_free_limit.absolute": "50MB",
        }
        if self.tls is not None:
            lines |= {
                "listeners.ssl.1": f"127.0.0.1:{self.tls_port}",
                "ssl_options.cacertfile": str(self.tls.ca),
                "ssl_options.certfile": str(self.tls.certificate),
                "ssl_options.keyfile": str(self.tls.key),
                "ssl_options.verify": "verify_peer",
                "ssl_options.fail_if_no_peer_cert": "false",
            }
            if self.tls.external_user is not None:
                lines |= {
                    "ssl_options.fail_if_no_peer_cert": "true",
                    "auth_mechanisms.1": "EXTERNAL",
                    "auth_mechanisms.2": "PLAIN",
                    "auth_mechanisms.3": "AMQPLAIN",
                    "ssl_cert_login_from": "common_name",
                }
        if self.management_port:
            lines |= {
                "management.tcp.ip": "127.0.0.1",
                "management.tcp.port": str(self.management_port),
            }
        if self._membership is not None and self._membership.peer is not None:
            lines |= {
                "cluster_formation.peer_discovery_backend": "classic_config",
                "cluster_formation.classic_config.nodes.1": self._membership.peer,
                "cluster_formation.classic_config.nodes.2": self.node,
            }
        lines |= self._settings
        return "".join(f"{name} = {value}\n" for name, value in lines.items())

    def _environment(self) -> dict[str, str]:
        # Settings of the machine's own server must not reach this one.
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RABBITMQ_", "ERL_", "LOG_BASE", "MNESIA_BASE"))
        }
        folder = str(self.folder)
        return inherited | {
            "HOME": folder,  # the Erlang cookie is made there
            "LC_ALL": "C.UTF-8",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq.conf",
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/enabled_plugins",
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_LOG_BASE": f"{folder}/log",
            "RABBITMQ_MNESIA_BASE": f"{folder}/data",
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_PID_FILE": f"{folder}/pid",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }

    def _add_external_user(self, name: str) -> None:
        if name not in self.ctl("list_users"):
            self.ctl("add_user", name, random.SystemRandom().randbytes(16).hex())
            self.ctl("clear_password", name)
            self.ctl("set_permissions", name, ".*", ".*", ".*")

    def _log_end(self) -> str:
        # Erlang names the cause first, then prints the state of everything that fell with it.
        lines = self.logs().splitlines()
        errors = [index for index, line in enumerate(lines) if "[error]" in line][:10]
        last = range(max(0, len(lines) - 10), len(lines))
        return "\n".join(lines[index] for index in sorted({*errors, *last}))


def _find_epmd() -> str | None:
    import glob
    import shutil

    found = shutil.which("epmd")
    if found is not None:
        return found
    for pattern in EPMD_PLACES:
        for name in sorted(glob.glob(pattern), reverse=True):
            if os.access(name, os.X_OK):
                return name
    return None


def _accepts(port: int) -> bool:
    import socket

    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _speaks_amqp(port: int) -> bool:
    """Return whether a broker answers the AMQP 0-9-1 protocol header with a method frame."""
    import socket

    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as probe:
            probe.settimeout(2.0)
            probe.sendall(b"AMQP\x00\x00\x09\x01")
            return probe.recv(1) == b"\x01"
    except OSError:
        return False
