"""TLS over memory: bytes in, bytes out, no socket.

`ssl.MemoryBIO` makes TLS the same in every environment: the stream moves encrypted bytes
as it moves any others, and nothing blocks.  (Measured: as fast as a green TLS socket,
with 256 KiB per read against 16 KiB.)

An SSL object is not thread-safe, so a `TLSLayer` is used from the hub's thread only.
"""

from __future__ import annotations

import ssl

from hub.errors import TLSError

__all__ = ["TLSLayer"]

# Plaintext taken out at once; a TLS record holds at most 16 KiB, so this is 16 of them.
_CHUNK = 262_144


class TLSLayer:
    """One TLS session as a filter between two byte streams.

    Args:
        context: says whom to trust and what to show.
        server_hostname: the name that the peer's certificate must be for, also sent as SNI;
            None only if the context does not check names.
        peer: "host:port", for error messages.

    Raises:
        TLSError: the context demands a host name and there is none.
    """

    def __init__(self, context: ssl.SSLContext, server_hostname: str | None, peer: str) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.peer = peer
        if context.check_hostname and not server_hostname:
            # Over memory, ssl itself does not object, and then takes a certificate for any name.
            raise TLSError(
                f"TLS with {peer} cannot begin: there is no name to look for in its certificate; "
                "pass server_hostname"
            )
        try:
            self._object = context.wrap_bio(
                self._incoming, self._outgoing, server_hostname=server_hostname
            )
        except ValueError as error:
            raise TLSError(f"TLS with {peer} cannot begin: {error}") from error
        #: True once the handshake is complete: data may be sent.
        self.established = False

    def handshake(self, data: bytes = b"") -> bytes:
        """Take in encrypted bytes, go on with the handshake, return what must be sent.

        Raises:
            TLSError: the handshake failed; the session is of no further use.  `to_send()`
                then returns the alert for the peer.
        """
        if data:
            self._incoming.write(data)
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            raise self._failure("the TLS handshake", error) from error
        else:
            self.established = True
        return self.to_send()

    def decrypt(self, data: bytes) -> tuple[list[bytes], bool]:
        """Take in encrypted bytes; return the plaintext chunks, and whether the peer has ended.

        Raises:
            TLSError: the peer broke the protocol.
        """
        if data:
            self._incoming.write(data)
        chunks: list[bytes] = []
        try:
            while True:
                chunk = self._object.read(_CHUNK)
                if not chunk:
                    # Not the end: a record may carry no data.  The end is announced below,
                    # or is the end of the socket.
                    if not self._incoming.pending and not self._object.pending():
                        return chunks, self._ended()
                    continue
                chunks.append(chunk)
        except ssl.SSLWantReadError:
            return chunks, False
        except ssl.SSLZeroReturnError:
            return chunks, True
        except ssl.SSLError as error:
            raise self._failure("the TLS session", error) from error

    def _ended(self) -> bool:
        """Tell whether the peer sent its close_notify."""
        try:
            self._object.unwrap()
        except ssl.SSLWantReadError:
            return False
        except (ssl.SSLError, OSError):
            return True
        return True

    def encrypt(self, data: bytes | memoryview) -> bytes:
        """Return `data` as encrypted bytes.

        Raises:
            TLSError: the session is broken.
        """
        view = memoryview(data)
        try:
            while view:
                view = view[self._object.write(view) :]
        except ssl.SSLError as error:
            raise self._failure("the TLS session", error) from error
        return self.to_send()

    def to_send(self) -> bytes:
        """Return what the session itself wants to send (handshake, alerts, key updates)."""
        return self._outgoing.read()

    def _failure(self, what: str, error: ssl.SSLError) -> TLSError:
        reason = (error.reason or "").replace("_", " ").lower() or str(error)
        if isinstance(error, ssl.SSLCertVerificationError):
            hint = (
                f"the certificate was refused ({error.verify_message}): give the right CA file, or "
                "connect by the name that the certificate is for"
            )
        elif error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL"):
            hint = "the peer does not speak TLS on this port: use its TLS port, or no TLS"
        else:
            hint = f"{reason}: compare versions, ciphers and certificates of both sides"
        return TLSError(f"{what} with {self.peer} failed: {hint}")
