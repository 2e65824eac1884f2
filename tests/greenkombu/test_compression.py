"""greenkombu.compression (behaviours 83, 205; scenario S31)."""

from __future__ import annotations

import bz2
import gzip
import lzma
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

from greenkombu import compression
from greenkombu.compression import compress, decompress
from greenkombu.exceptions import (
    BodyTooLarge,
    CompressorNotInstalled,
    DecodeError,
    DecompressionBomb,
)
from tests.support.bombs import METHODS, make_bomb, zstd_frame

MIB = 1024 * 1024

TYPES = {
    "gzip": "application/x-gzip",
    "zlib": "application/x-gzip",
    "bzip2": "application/x-bz2",
    "bzip": "application/x-bz2",
    "lzma": "application/x-lzma",
    "xz": "application/x-lzma",
    "brotli": "application/x-brotli",
    "zstd": "application/zstd",
    "zstandard": "application/zstd",
}


@pytest.fixture(autouse=True)
def _keep_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_aliases", "_encoders", "_decoders"):
        monkeypatch.setattr(compression, name, dict(getattr(compression, name)))


@pytest.mark.parametrize("alias", TYPES)
def test_b205_every_alias_compresses_and_names_its_content_type(alias: str) -> None:
    body = b"some text " * 100
    packed, content_type = compress(body, alias)
    assert content_type == TYPES[alias]
    assert len(packed) < len(body)
    assert decompress(packed, content_type) == decompress(packed, alias) == body


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("body", [b"", b"x", bytes(range(256)) * 5000], ids=["empty", "1", "1 MB"])
def test_bodies_of_all_sizes_come_back(method: str, body: bytes) -> None:
    assert decompress(*compress(body, method)) == body


def test_b205_text_is_utf8() -> None:
    assert decompress(*compress("é", "zlib")) == b"\xc3\xa9"


def test_b205_encoders_lists_content_types() -> None:
    assert set(compression.encoders()) == set(TYPES.values())


def test_b205_get_encoder_and_get_decoder_take_aliases_and_content_types() -> None:
    for name in ("zlib", "application/x-gzip"):
        encoder, content_type = compression.get_encoder(name)
        assert content_type == "application/x-gzip"
        assert compression.get_decoder(name)(encoder(b"x")) == b"x"


@pytest.mark.parametrize("call", [compression.get_encoder, compression.get_decoder])
def test_b205_unknown_method_is_a_key_error(call: Callable[[str], object]) -> None:
    with pytest.raises(KeyError) as caught:
        call("nosuch")
    assert isinstance(caught.value, CompressorNotInstalled)
    assert "'nosuch'" in str(caught.value)
    assert "zlib" in str(caught.value)


def test_b205_register_with_aliases() -> None:
    compression.register(
        lambda body: body[::-1], lambda body: body[::-1], "application/x-reversed", ["rev"]
    )
    assert compress(b"abc", "rev") == (b"cba", "application/x-reversed")
    assert decompress(b"cba", "application/x-reversed") == b"abc"


def test_a_method_may_only_expand() -> None:
    compression.register(None, lambda body: body, "application/x-old", ["old"])
    assert decompress(b"x", "old") == b"x"
    with pytest.raises(KeyError):
        compress(b"x", "old")


def test_a_missing_package_is_named() -> None:
    script = (
        "import sys\n"
        "for name in ('brotli', 'brotlicffi', 'zstandard', '_zstd'): sys.modules[name] = None\n"
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if sys.modules.get(n, n) is None"
        " else find(n, *a)\n"
        "from greenkombu import compression\n"
        "for name in ('zstd', 'application/x-brotli'):\n"
        "    try: compression.compress(b'x', name)\n"
        "    except KeyError as exc: print(exc)\n"
        "print(compression.encoders())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert "greenkombu[zstd]" in done.stdout, done.stderr
    assert "greenkombu[brotli]" in done.stdout
    assert "zstd'" not in done.stdout.splitlines()[-1]


# -- what other programs send ------------------------------------------------------------


def test_gzip_files_are_understood_too() -> None:
    assert decompress(gzip.compress(b"x" * 1000), "gzip") == b"x" * 1000


def test_streams_one_after_another_are_one_body() -> None:
    assert decompress(bz2.compress(b"a") + bz2.compress(b"b"), "bzip2") == b"ab"
    assert decompress(lzma.compress(b"a") + lzma.compress(b"b"), "lzma") == b"ab"
    alone = lzma.compress(b"a", format=lzma.FORMAT_ALONE)
    assert decompress(alone, "lzma") == b"a"


@pytest.mark.parametrize("method", ["zlib", "bzip2", "lzma", "zstd"])
def test_what_follows_the_stream_is_ignored(method: str) -> None:
    packed, _ = compress(b"x" * 1000, method)
    assert decompress(packed + b"not a stream", method) == b"x" * 1000


def test_zstd_without_content_size() -> None:
    frame = zstd_frame(100, b"a", b"b")
    assert decompress(frame, "zstd") == b"a" * (100 * 128 * 1024) + b"b"
    with pytest.raises(DecodeError):
        decompress(frame[:-1], "zstd")


# -- damage ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("damage", ["cut", "cut to nothing", "garbage", "flipped"])
def test_damaged_bodies_are_typed_errors(method: str, damage: str) -> None:
    packed, _ = compress(bytes(range(256)) * 40, method)
    body = {
        "cut": packed[: len(packed) * 2 // 3],
        "cut to nothing": b"",
        "garbage": b"\x07 this was never compressed",
        "flipped": packed[:8] + bytes(b ^ 0xFF for b in packed[8:]),
    }[damage]
    with pytest.raises(DecodeError, match=f"{len(body)} bytes with {method}"):
        decompress(body, method)


# -- bombs (S31) -------------------------------------------------------------------------


def zstandard_bomb_that_states_its_size(size: int) -> bytes:
    # Descriptor: 8 bytes of content size, no checksum.
    head = bytes.fromhex("28b52ffd c0 38") + (10 * 1024 * MIB).to_bytes(8, "little")
    return head + zstd_frame(size // 4)[6:]


def zstandard_bomb_that_lies(size: int) -> bytes:
    head = bytes.fromhex("28b52ffd c0 38") + (40 * MIB).to_bytes(8, "little")
    return head + zstd_frame(size // 4)[6:]


@pytest.fixture
def peak() -> Iterator[Callable[[], int]]:
    """The largest number of bytes that Python objects took since the test began."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        yield lambda: tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


# What is kept while measuring, and one step; nowhere near the limit.
FLAT = compression.KEEP_BYTES + 12 * MIB


@pytest.mark.parametrize("method", METHODS)
def test_s31_ten_gigabytes_stop_at_the_limit_and_memory_stays_flat(
    method: str, peak: Callable[[], int]
) -> None:
    limit = compression.max_decompressed_bytes
    assert limit == 128 * MIB
    bomb = make_bomb(method)
    tracemalloc.reset_peak()
    with pytest.raises(DecompressionBomb, match=f"more than {limit} bytes") as caught:
        decompress(bomb, method)
    assert peak() < len(bomb) + FLAT
    assert isinstance(caught.value, (BodyTooLarge, DecodeError))
    assert "max_decompressed_bytes" in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_bombs_are_valid_bodies(method: str) -> None:
    """Those of the test above, but small: they are refused for their size and nothing else."""
    assert decompress(make_bomb(method, 8 * MIB), method) == bytes(8 * MIB)


def test_s31_a_frame_that_states_ten_gigabytes_is_refused_by_its_header(
    peak: Callable[[], int],
) -> None:
    with pytest.raises(DecompressionBomb):
        decompress(zstandard_bomb_that_states_its_size(MIB), "zstd")
    assert peak() < FLAT


def test_a_frame_that_lies_about_its_size_is_a_typed_error() -> None:
    with pytest.raises(DecodeError):
        decompress(zstandard_bomb_that_lies(10 * MIB), "zstd")


@pytest.mark.parametrize("method", METHODS)
def test_the_limit_is_exact(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = compress(bytes(100_000), method)
    monkeypatch.setattr(compression, "max_decompressed_bytes", 100_000)
    assert decompress(packed, method) == bytes(100_000)
    monkeypatch.setattr(compression, "max_decompressed_bytes", 99_999)
    with pytest.raises(DecompressionBomb):
        decompress(packed, method)
    monkeypatch.setattr(compression, "max_decompressed_bytes", None)
    assert decompress(packed, method) == bytes(100_000)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("limit", [128 * MIB, None], ids=["limited", "unlimited"])
def test_large_bodies_within_the_limit_come_back(
    method: str, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "max_decompressed_bytes", limit)
    body = b"".join(bytes([n % 251]) * 65_537 for n in range(300))  # 19.7 MB
    assert len(body) > compression.KEEP_BYTES
    fast = {
        "brotli": lambda: __import__("brotli").compress(body, quality=1),
        "lzma": lambda: lzma.compress(body, preset=0),
    }
    packed = fast[method]() if method in fast else compress(body, method)[0]
    assert decompress(packed, method) == body


def test_old_brotli_without_output_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    brotli = pytest.importorskip("brotli", reason="brotli is an optional package")

    make = brotli.Decompressor

    class OldDecompressor:
        def __init__(self) -> None:
            self._new = make()

        def process(self, data: bytes) -> bytes:
            result: bytes = self._new.process(data)
            return result

        def is_finished(self) -> bool:
            return bool(self._new.is_finished())

    monkeypatch.setattr(brotli, "Decompressor", OldDecompressor)
    body = bytes(range(256)) * 100
    packed, _ = compress(body, "brotli")
    assert decompress(packed, "brotli") == body
    monkeypatch.setattr(compression, "max_decompressed_bytes", 20 * MIB)
    with pytest.raises(DecompressionBomb):
        decompress(make_bomb("brotli"), "brotli")
    with pytest.raises(DecodeError):
        decompress(packed[:-1], "brotli")
