"""From Kombu's `ssl` argument to an `ssl.SSLContext`.

The certificate of the broker is verified as soon as TLS is asked for.  Turning that off takes an
explicit `cert_reqs=ssl.CERT_NONE` (or `verify_mode`, `check_hostname=False`), and is warned about.
A new context is made for each connection, so that renewed certificate files are read.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from greenkombu.exceptions import ArgumentError

if TYPE_CHECKING:
    import ssl

__all__ = ["InsecureTLSWarning", "make_context"]

# Options of the ``amqp`` package that mean nothing here: the hub shakes hands and handles EOF.
_IGNORED = frozenset(
    {"do_handshake_on_connect", "suppress_ragged_eofs", "server_side", "session", "sock"}
)

_KNOWN = frozenset(
    {
        "ca_certs",
        "cafile",
        "cadata",
        "capath",
        "cert_reqs",
        "certfile",
        "check_hostname",
        "ciphers",
        "context",
        "keyfile",
        "password",
        "purpose",
        "server_hostname",
        "ssl_version",
        "verify_mode",
    }
)


class InsecureTLSWarning(UserWarning):
    """TLS is used without verifying the broker: anybody on the way can read and change it."""


def make_context(given: Any, host: str) -> tuple[ssl.SSLContext | None, str | None]:
    """Return the context for a connection to *host*, and the name that its certificate must have.

    Args:
        given: False or None for no TLS; True; a dict of options (ca_certs, certfile, keyfile,
            password, cert_reqs, check_hostname, ciphers, server_hostname, or a dict `context` with
            cafile, capath, cadata, ...); or an `ssl.SSLContext`, which is used as it is.

    Raises:
        ArgumentError: an option that is not known or makes no sense, or a file that cannot be
            read. It is no error of the connection: no retry could mend it.
    """
    if not given and not isinstance(given, Mapping):
        return None, None
    import ssl

    if isinstance(given, ssl.SSLContext):
        _warn_unless_verifying(given, host)
        return given, host
    options: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {}
    nested = options.pop("context", None)
    if isinstance(nested, ssl.SSLContext):
        _warn_unless_verifying(nested, host)
        return nested, options.get("server_hostname") or host
    options.update(nested or {})
    unknown = sorted(set(options) - _KNOWN - _IGNORED)
    if unknown:
        raise ArgumentError(
            f"unknown ssl options {', '.join(unknown)}; known are {', '.join(sorted(_KNOWN))}"
        )
    trusted = {name: options.get(name) for name in ("ca_certs", "cafile", "capath", "cadata")}
    if trusted["capath"] and not os.path.isdir(trusted["capath"]):
        # OpenSSL would trust nobody, and not say why.
        raise ArgumentError(f"ssl option capath={trusted['capath']!r}: there is no such folder")
    with _naming(trusted, "the certificates, as PEM, of the authorities that you trust"):
        context = ssl.create_default_context(
            cafile=trusted["ca_certs"] or trusted["cafile"],
            capath=trusted["capath"],
            cadata=trusted["cadata"],
        )
    certificate, key = options.get("certfile"), options.get("keyfile")
    if key and not certificate:
        raise ArgumentError("ssl option keyfile without certfile: give the certificate of the key")
    if certificate:
        with _naming(
            {"certfile": certificate, "keyfile": key},
            "your certificate, the private key that belongs to it (in the same file or in"
            " keyfile), both as PEM, and the key's password if it has one",
        ):
            context.load_cert_chain(certificate, key, options.get("password"))
    if options.get("ciphers"):
        with _naming({"ciphers": options["ciphers"]}, "names that `openssl ciphers` lists"):
            context.set_ciphers(options["ciphers"])
    name = "cert_reqs" if "cert_reqs" in options else "verify_mode"
    verify = options.get(name)
    if isinstance(verify, str):  # from a URL
        verify = ssl.VerifyMode.__members__.get(verify.upper(), verify)
    if options.get("check_hostname") is False or verify in (ssl.CERT_NONE, ssl.CERT_OPTIONAL):
        context.check_hostname = False
    if verify is not None:
        with _naming({name: verify}, "ssl.CERT_REQUIRED, CERT_OPTIONAL or CERT_NONE"):
            context.verify_mode = ssl.VerifyMode(verify)
    _warn_unless_verifying(context, host)
    return context, options.get("server_hostname") or host


@contextmanager
def _naming(options: Mapping[str, Any], wanted: str) -> Iterator[None]:
    """Turn what the ssl module raises into an error that names options and remedy."""
    try:
        yield
    except (OSError, ValueError, TypeError) as exc:  # ssl.SSLError is an OSError
        given = " and ".join(
            f"{name}={value!r:.200}" for name, value in options.items() if value is not None
        )
        raise ArgumentError(
            f"ssl option {given} cannot be used ({_reason(options, exc)}): give {wanted}"
        ) from exc


def _reason(options: Mapping[str, Any], exc: Exception) -> str:
    # Neither OSError nor OpenSSL says which file it was.
    if isinstance(exc, FileNotFoundError):
        for value in options.values():
            if isinstance(value, (str, os.PathLike)) and not os.path.exists(value):
                return f"there is no file {os.fspath(value)!r}"
    return str(exc)


def _warn_unless_verifying(context: ssl.SSLContext, host: str) -> None:
    import ssl

    if context.verify_mode != ssl.CERT_REQUIRED:
        missing = "the certificate"
    elif not context.check_hostname:
        missing = "the name in the certificate"
    else:
        return
    warnings.warn(
        f"TLS to {host} does not verify {missing} of the broker",
        InsecureTLSWarning,
        stacklevel=3,
    )
