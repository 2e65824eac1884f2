"""Compressing message bodies.

A method has a content type, which travels in the message's ``compression`` header, and aliases:

=====================  =====================  ================================
content type           aliases                needs
=====================  =====================  ================================
application/x-gzip     gzip, zlib             -
application/x-bz2      bzip2, bzip            -
application/x-lzma     lzma, xz               -
application/x-brotli   brotli                 ``greenkombu[brotli]``
application/zstd       zstd, zstandard        ``greenkombu[zstd]``, or Python 3.14
=====================  =====================  ================================

(What is called gzip here is the zlib format, as in Kombu; both are understood.)

Bombs: 10 MB can expand to 10 GB.  Expansion therefore goes in steps whose output is bounded, and
stops with DecompressionBomb at `max_decompressed_bytes`.  A body that expands beyond `KEEP_BYTES`
is first only measured, and kept in a second pass if it is within the limit; so a bomb never takes
more memory than that, whatever the limit is, and only large bodies are expanded twice.

An expander here is an iterator of chunks: it yields the output in pieces of bounded size and raises
when the data is damaged or cut short.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from typing import Any

from greenkombu.exceptions import CompressorNotInstalled, DecodeError, DecompressionBomb
from greenkombu.utils.encoding import ensure_bytes

__all__ = [
    "CHUNK_BYTES",
    "KEEP_BYTES",
    "LZMA_MEMORY_BYTES",
    "SLICE_BYTES",
    "compress",
    "decompress",
    "encoders",
    "get_decoder",
    "get_encoder",
    "max_decompressed_bytes",
    "register",
]

#: The largest body that `decompress` returns, in bytes; None is without limit.  The same 128 MiB as
#: `greenkombu.serialization.max_body_bytes`: a body that is refused plain is not accepted packed.
max_decompressed_bytes: int | None = 128 * 1024 * 1024

#: Output of one step, in bytes: large enough that steps cost nothing beside the expansion itself.
CHUNK_BYTES = 256 * 1024

#: Output that is kept while it is not known yet how much there will be, in bytes.
KEEP_BYTES = 16 * 1024 * 1024

#: Input of one step, in bytes.
SLICE_BYTES = 8 * 1024

#: What the xz format may ask for its dictionary, in bytes: ``xz -9`` needs 65 MiB to expand.
LZMA_MEMORY_BYTES = 80 * 1024 * 1024

_aliases: dict[str, str] = {}
_encoders: dict[str, Callable[[bytes], bytes]] = {}
_decoders: dict[str, Callable[[bytes], bytes]] = {}

#: Methods that were known but not installed when this module was imported.
_missing: dict[str, str] = {}


def register(
    encoder: Callable[[bytes], bytes] | None,
    decoder: Callable[[bytes], bytes] | None,
    content_type: str,
    aliases: Iterable[str] | None = None,
) -> None:
    """Add a compression method, or replace the one of that content type.

    Args:
        encoder: compresses bytes; None if the method only expands.
        decoder: expands bytes; None if the method only compresses.  It must itself bound what it
            returns.
        content_type: what messages call the method.
        aliases: what programs call it.
    """
    if encoder is not None:
        _encoders[content_type] = encoder
    if decoder is not None:
        _decoders[content_type] = decoder
    _aliases.update((alias, content_type) for alias in aliases or ())


def encoders() -> list[str]:
    """Return the content types that can be compressed."""
    return list(_encoders)


def get_encoder(t: str) -> tuple[Callable[[bytes], bytes], str]:
    """Return (function, content type) for compressing.

    Args:
        t: an alias or a content type.

    Raises:
        CompressorNotInstalled: (a KeyError) there is no such method.
    """
    if not isinstance(t, str):
        raise _not_installed(t)
    content_type = _aliases.get(t, t)
    try:
        return _encoders[content_type], content_type
    except KeyError:
        raise _not_installed(t) from None


def get_decoder(t: str) -> Callable[[bytes], bytes]:
    """Return the function that expands.

    Args:
        t: an alias or a content type.

    Raises:
        CompressorNotInstalled: (a KeyError) there is no such method.
    """
    if not isinstance(t, str):  # a header can hold anything
        raise _not_installed(t)
    try:
        return _decoders[_aliases.get(t, t)]
    except KeyError:
        raise _not_installed(t) from None


def _not_installed(t: object) -> CompressorNotInstalled:
    extra = _missing.get(str(t))
    if extra is not None:
        return CompressorNotInstalled(
            f"compression {t!r} needs another package: pip install 'greenkombu[{extra}]'"
        )
    return CompressorNotInstalled(
        f"there is no compression {t!r}; there are {', '.join(sorted(_aliases))}"
    )


def compress(body: str | bytes, content_type: str) -> tuple[bytes, str]:
    """Compress a body.

    Args:
        body: bytes, or text, which is encoded as UTF-8.
        content_type: the method's alias or content type.

    Returns:
        (compressed body, the method's content type).

    Raises:
        CompressorNotInstalled: (a KeyError) there is no such method.
    """
    encoder, content_type = get_encoder(content_type)
    return encoder(ensure_bytes(body)), content_type


def decompress(body: bytes, content_type: str) -> bytes:
    """Expand a compressed body.

    Args:
        body: the compressed body.
        content_type: the method's alias or content type.

    Returns:
        The body as it was.

    Raises:
        CompressorNotInstalled: (a KeyError) there is no such method.
        DecompressionBomb: it expands beyond `max_decompressed_bytes`; expansion has stopped.
        DecodeError: it is damaged or cut short.
    """
    decoder = get_decoder(content_type)
    try:
        return decoder(body)
    except (DecodeError, MemoryError):
        raise
    except Exception as exc:
        raise DecodeError(
            f"cannot expand a body of {len(body)} bytes with {content_type}: "
            f"{str(exc) or type(exc).__name__}"
        ) from exc


# -- expanding within bounds


def _bomb(body: bytes, limit: int) -> DecompressionBomb:
    return DecompressionBomb(
        f"a compressed body of {len(body)} bytes expands to more than {limit} bytes; raise "
        "greenkombu.compression.max_decompressed_bytes if that is meant"
    )


def _bounded(expand: Callable[[bytes], Iterator[bytes]]) -> Callable[[bytes], bytes]:
    """Return a decoder that keeps to the limits, made from an expander."""

    def decoder(body: bytes) -> bytes:
        limit = max_decompressed_bytes
        chunks: list[bytes] = []
        total = 0
        measuring = False
        for chunk in expand(body):
            total += len(chunk)
            if limit is not None and total > limit:
                raise _bomb(body, limit)
            if chunk and not measuring:
                chunks.append(chunk)
                if limit is not None and total > KEEP_BYTES:
                    measuring = True
                    chunks.clear()
        if not measuring:
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)
        # It ended within the limit: now it may have the memory, all of it in one piece.
        whole = bytearray(total)
        position = 0
        for chunk in expand(body):
            whole[position : position + len(chunk)] = chunk
            position += len(chunk)
        return bytes(whole)

    return decoder


def _slices(body: bytes, start: int = 0) -> Iterator[memoryview]:
    # What a decompressor did not consume it returns as a copy: of a slice, not of 10 MB each time.
    view = memoryview(body)
    for position in range(start, len(body), SLICE_BYTES):
        yield view[position : position + SLICE_BYTES]


def _cut_short() -> EOFError:
    return EOFError("the compressed data ends too early")


def _expand_zlib(body: bytes) -> Iterator[bytes]:
    # +32: the header says whether it is the zlib or the gzip format.
    expander = zlib.decompressobj(zlib.MAX_WBITS + 32)
    for data in _slices(body):
        rest: bytes | memoryview = data
        while rest:
            yield expander.decompress(rest, CHUNK_BYTES)
            if expander.eof:
                return
            rest = expander.unconsumed_tail
    while chunk := expander.decompress(b"", CHUNK_BYTES):
        yield chunk
    if not expander.eof:
        raise _cut_short()


_large_zlib = _bounded(_expand_zlib)


def _decompress_zlib(body: bytes) -> bytes:
    # Most bodies are small, and this is the method that everyone has: without the machinery then.
    expander = zlib.decompressobj(zlib.MAX_WBITS + 32)
    chunk = expander.decompress(body, CHUNK_BYTES)
    limit = max_decompressed_bytes
    if expander.eof and (limit is None or len(chunk) <= limit):
        return chunk
    return _large_zlib(body)


def _expand_streams(
    body: bytes, make: Callable[[], Any], error: type[Exception]
) -> Iterator[bytes]:
    # bz2, lzma and Python 3.14's zstd have one interface.  Several streams may follow each other;
    # what follows the last and is none is ignored, as by bz2.decompress() and lzma.decompress().
    position = 0
    while position < len(body) or position == 0:
        expander = make()
        consumed = position
        try:
            for data in _slices(body, position):
                consumed += len(data)
                yield expander.decompress(data, CHUNK_BYTES)
                while not expander.eof and not expander.needs_input:
                    yield expander.decompress(b"", CHUNK_BYTES)
                if expander.eof:
                    break
        except error:
            if position == 0:
                raise
            return
        if not expander.eof:
            raise _cut_short()
        position = consumed - len(expander.unused_data)


def _expand_bz2(body: bytes) -> Iterator[bytes]:
    import bz2

    return _expand_streams(body, bz2.BZ2Decompressor, OSError)


def _expand_lzma(body: bytes) -> Iterator[bytes]:
    import lzma

    def make() -> Any:
        return lzma.LZMADecompressor(memlimit=LZMA_MEMORY_BYTES)

    return _expand_streams(body, make, lzma.LZMAError)


def _expand_brotli(body: bytes) -> Iterator[bytes]:
    brotli = _import_brotli()
    expander = brotli.Decompressor()
    if hasattr(expander, "can_accept_more_data"):  # brotli 1.2
        chunk = expander.process(body, output_buffer_limit=CHUNK_BYTES)
        while chunk or not expander.can_accept_more_data():
            yield chunk
            chunk = expander.process(b"", output_buffer_limit=CHUNK_BYTES)
    else:
        # Older ones return all the output that their input gives, up to 16 MiB for each command of
        # a few bytes (RFC 7932, section 9.2): so they get a few bytes at a time.
        for start in range(0, len(body), 16):
            yield expander.process(body[start : start + 16])
    if not expander.is_finished():
        raise _cut_short()


def _expand_zstandard(body: bytes) -> Iterator[bytes]:
    import zstandard

    size = zstandard.frame_content_size(body)  # what the header claims; -1 if nothing
    limit = max_decompressed_bytes
    if limit is not None and size > limit:
        raise _bomb(body, limit)
    expander = zstandard.ZstdDecompressor()
    if 0 <= size <= KEEP_BYTES:
        yield expander.decompress(body)
        return
    if size >= 0:
        total = 0
        reader = expander.stream_reader(body)
        while chunk := reader.read(CHUNK_BYTES):
            yield chunk
            total += len(chunk)
        if total != size:
            raise _cut_short()
        return
    # Nothing tells whether a stream reader came to the end of its frame, and this object cannot
    # bound its output: a block of 4 bytes gives 128 KiB (RFC 8878, section 3.1.1.2), so 128 bytes
    # of input give 4 MiB at most.  Senders that do not state the size are rare.
    stream = expander.decompressobj()
    for start in range(0, len(body), 128):
        if stream.eof:
            return
        yield stream.decompress(body[start : start + 128])
    if not stream.eof:
        raise _cut_short()


def _expand_zstd(body: bytes) -> Iterator[bytes]:
    from compression import zstd

    return _expand_streams(body, zstd.ZstdDecompressor, zstd.ZstdError)


# -- compressing: modules are imported when they are first used


def _compress_bz2(body: bytes) -> bytes:
    import bz2

    return bz2.compress(body)


def _compress_lzma(body: bytes) -> bytes:
    import lzma

    return lzma.compress(body)


def _import_brotli() -> Any:
    try:
        import brotli
    except ImportError:
        import brotlicffi as brotli
    return brotli


def _compress_brotli(body: bytes) -> bytes:
    packed: bytes = _import_brotli().compress(body)
    return packed


def _compress_zstandard(body: bytes) -> bytes:
    import zstandard

    packed: bytes = zstandard.ZstdCompressor().compress(body)
    return packed


def _compress_zstd(body: bytes) -> bytes:
    from compression import zstd

    packed: bytes = zstd.compress(body)
    return packed


def _register_defaults() -> None:
    register(zlib.compress, _decompress_zlib, "application/x-gzip", ["gzip", "zlib"])
    # A Python may be built without these two.
    standard = [
        ("_bz2", _compress_bz2, _expand_bz2, "application/x-bz2", ["bzip2", "bzip"]),
        ("_lzma", _compress_lzma, _expand_lzma, "application/x-lzma", ["lzma", "xz"]),
    ]
    for module, encoder, expander, content_type, aliases in standard:
        if find_spec(module) is not None:
            register(encoder, _bounded(expander), content_type, aliases)
    content_type, aliases = "application/x-brotli", ["brotli"]
    if find_spec("brotli") is not None or find_spec("brotlicffi") is not None:
        register(_compress_brotli, _bounded(_expand_brotli), content_type, aliases)
    else:
        _missing.update(dict.fromkeys([content_type, *aliases], "brotli"))
    content_type, aliases = "application/zstd", ["zstd", "zstandard"]
    if find_spec("_zstd") is not None:  # Python 3.14
        register(_compress_zstd, _bounded(_expand_zstd), content_type, aliases)
    elif find_spec("zstandard") is not None:
        register(_compress_zstandard, _bounded(_expand_zstandard), content_type, aliases)
    else:
        _missing.update(dict.fromkeys([content_type, *aliases], "zstd"))


_register_defaults()
