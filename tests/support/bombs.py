"""Compressed bodies that expand to ten gigabytes, built without ever having these.

What one block or stream of zeros gives is repeated; no method here needs more than 10 MB.
"""

from __future__ import annotations

import bz2
import functools
import lzma
import zlib

import pytest

__all__ = ["EXPANDED_BYTES", "METHODS", "make_bomb", "zstd_frame"]

MIB = 1024 * 1024

#: What a bomb expands to.
EXPANDED_BYTES = 10 * 1024 * MIB

METHODS = ["zlib", "zstd", "brotli", "bzip2", "lzma"]


@functools.cache
def make_bomb(method: str, size: int = EXPANDED_BYTES) -> bytes:
    """Return a complete, valid body that expands to *size* zeros; a multiple of 4 MiB.

    One is made once in a run; the five take 0.2 s and 11 MB together.
    """
    assert size % (4 * MIB) == 0
    return _MAKERS[method](size)


def zstd_frame(blocks: int, byte: bytes = b"\0", last: bytes = b"") -> bytes:
    """Return a frame that does not state its size: *blocks* times 128 KiB of a byte, and *last*.

    RFC 8878, 3.1.1.2: a block of type RLE (1) repeats one byte; 1 in its lowest bit is the end.
    """
    block = (128 * 1024 << 3 | 1 << 1).to_bytes(3, "little") + byte
    end = (len(last) << 3 | 1).to_bytes(3, "little") + last
    # Descriptor: no size, no checksum, no dictionary. Window: 2**(10 + 7) bytes.
    return bytes.fromhex("28b52ffd 00 38") + block * blocks + end


def _zlib(size: int) -> bytes:
    packer = zlib.compressobj(9)
    head = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    again = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    # The empty final block (RFC 1951, 3.2.4), and the Adler-32 of zeros: a stays 1, b counts them.
    adler = (size % 65521) << 16 | 1
    return head + again * (size // MIB - 1) + b"\x01\0\0\xff\xff" + adler.to_bytes(4, "big")


def _brotli(size: int) -> bytes:
    brotli = pytest.importorskip("brotli", reason="brotli is an optional package")
    packer = brotli.Compressor(quality=5)
    head = packer.process(bytes(MIB)) + packer.flush()
    again = packer.process(bytes(MIB)) + packer.flush()
    packed: bytes = head + again * (size // MIB - 1) + packer.finish()
    return packed


_MAKERS = {
    "zlib": _zlib,
    "zstd": lambda size: zstd_frame(size // (128 * 1024)),
    "brotli": _brotli,
    # Streams may follow each other.
    "bzip2": lambda size: bz2.compress(bytes(4 * MIB)) * (size // (4 * MIB)),
    "lzma": lambda size: lzma.compress(bytes(4 * MIB), preset=0) * (size // (4 * MIB)),
}
