"""zstd, for bodies of websocket messages.

Whoever decompresses must not trust what arrives: a few bytes can claim, or become, gigabytes. So
the structure of the data is walked before it is decoded: every block says how large it is and at
most gets, which gives pieces whose results are small, and shows data that is cut off or followed
by something else.

`zstandard` is imported when it is first needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib.util import find_spec
from threading import get_ident
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lonelypsp.errors import LocalProtocolError, RemoteProtocolError
from lonelypsp.messages import Buffer

if TYPE_CHECKING:
    import zstandard

UNCOMPRESSED = 0
WITHOUT_DICTIONARY = 1
FIRST_CUSTOM = 65_536
"""Compressor ids; those in between stand for dictionaries that both sides were given."""

MAX_WINDOW_SIZE = 8 * 1024 * 1024
MAX_RATIO = 1000
RATIO_FREE = 1024 * 1024
"""Bytes that may come out of however little: below this, ratios mean nothing."""
_DEFAULT_LEVEL = 3
MAX_LEVEL = 19
"""Levels above use windows of more than `MAX_WINDOW_SIZE`, which receivers refuse."""

_PIECE = 1024 * 1024
_BLOCK_MAX = 128 * 1024
# of the zstd format, RFC 8878
_MAGIC = 0xFD2FB528
_SKIPPABLE = 0x184D2A50  # to ...5F
_HEAD = 5
_KNOWS_SIZE = 0xE0
_HAS_CHECKSUM = 4
_RLE, _COMPRESSED = 1, 2


def available() -> bool:
    """Whether zstandard is installed."""
    return find_spec("zstandard") is not None


def decompress(
    data: Buffer,
    *,
    dictionary: bytes | None,
    expected_length: int,
    max_window_size: int = MAX_WINDOW_SIZE,
    max_ratio: int = MAX_RATIO,
) -> bytes:
    """What `data` was before compression, see `decompress_pieces`."""
    if 0 < expected_length <= _PIECE and len(data) > _HEAD and data[4] & _KNOWS_SIZE == 0:
        # The usual small frame, at once: the decoder stops at what is expected. Anything else
        # about it is found out below.
        zstd = _zstd()
        try:
            whole: bytes = _decoder(dictionary, max_window_size, get_ident()).decompress(
                data, max_output_size=expected_length, allow_extra_data=False
            )
        except zstd.ZstdError:
            whole = b""
        if len(whole) == expected_length:
            return whole
    return b"".join(
        decompress_pieces(
            data,
            dictionary=dictionary,
            expected_length=expected_length,
            max_window_size=max_window_size,
            max_ratio=max_ratio,
        )
    )


def decompress_pieces(
    data: Buffer,
    *,
    dictionary: bytes | None,
    expected_length: int,
    max_window_size: int = MAX_WINDOW_SIZE,
    max_ratio: int = MAX_RATIO,
) -> Iterator[bytes]:
    """What `data` was before compression, in pieces of about 1 MiB.

    Args:
        data: one or more whole zstd frames, with nothing behind them.
        dictionary: the one it was compressed with.
        expected_length: bytes that must come out. The caller bounds it.
        max_window_size: bytes of history the decoder may keep; 0: the library's limit, 128 MiB.
        max_ratio: how much larger than `data` the result may be, once it exceeds 1 MiB.

    Raises:
        RemoteProtocolError: the data is not that. This may show only at the end, so no piece counts
            before.
        LocalProtocolError: zstd is not installed, or `max_window_size` makes no sense.
    """
    zstd = _zstd()
    if max_window_size and not 1 << 10 <= max_window_size <= 1 << 31:
        raise LocalProtocolError(f"max_window_size: {max_window_size} is not between 2^10 and 2^31")
    if expected_length > max(RATIO_FREE, max_ratio * len(data)):
        raise RemoteProtocolError(
            f"{len(data):,} bytes claim to become {expected_length:,},"
            f" more than {max_ratio:,} times as many",
            status=413,
        )
    length = 0
    try:
        decoder = zstd.ZstdDecompressor(
            dict_data=_dictionary(dictionary), max_window_size=max_window_size
        ).decompressobj(read_across_frames=True)
        for piece in _pieces(memoryview(data)):
            out = decoder.decompress(piece)
            length += len(out)
            if length > expected_length:
                break
            yield out
    except zstd.ZstdError as e:
        raise RemoteProtocolError(f"compressed body: {e}") from e
    if length != expected_length:
        than = "more" if length > expected_length else f"only {length:,}"
        raise RemoteProtocolError(
            f"compressed body: becomes {than} than the {expected_length:,} bytes declared"
        )


def pays(length: int, compressed: int) -> bool:
    """Whether a body of `length` bytes should be sent as the `compressed` bytes it became: they
    are fewer, but not so few that a receiver takes them for an attack."""
    return compressed < length <= max(RATIO_FREE, MAX_RATIO * compressed)


def compress(data: Buffer, *, dictionary: bytes | None, level: int) -> bytes:
    """One zstd frame.

    Raises:
        LocalProtocolError: zstd is not installed, or the dictionary is unusable.
    """
    if len(data) <= _PIECE:
        zstd = _zstd()
        try:
            whole: bytes = _encoder(dictionary, min(level, MAX_LEVEL), get_ident()).compress(data)
        except zstd.ZstdError as e:
            raise LocalProtocolError(f"compression at level {level}: {e}") from e
        return whole
    return b"".join(compress_pieces([data], length=len(data), dictionary=dictionary, level=level))


def compress_pieces(
    chunks: Iterable[Buffer], *, length: int, dictionary: bytes | None, level: int
) -> Iterator[bytes]:
    """One zstd frame, in pieces, of a body that is too large to hold.

    Args:
        chunks: the body.
        length: its bytes; the window is chosen by it.
        dictionary: None: without.
        level: a recommendation, reduced to `MAX_LEVEL`.

    Raises:
        LocalProtocolError: as `compress`, or the chunks do not add up to `length`.
    """
    zstd = _zstd()
    try:
        encoder = zstd.ZstdCompressor(
            level=min(level, MAX_LEVEL),
            dict_data=_dictionary(dictionary),
            write_content_size=False,
            write_checksum=False,
            write_dict_id=False,
        ).compressobj(size=length)
        for chunk in chunks:
            yield encoder.compress(chunk)
        yield encoder.flush()
    except zstd.ZstdError as e:
        raise LocalProtocolError(f"compression at level {level}: {e}") from e


def _pieces(data: memoryview) -> Iterator[memoryview]:
    """Slices of `data` that each become about `_PIECE` bytes; together they are all of it."""
    start = becomes = 0
    for end, at_most in _blocks(data):
        becomes += at_most
        if becomes >= _PIECE or end == len(data):
            yield data[start:end]
            start, becomes = end, 0


def _blocks(data: memoryview) -> Iterator[tuple[int, int]]:
    """The end of every block of every frame, and how many bytes it becomes at most.

    Raises:
        RemoteProtocolError: `data` is not a whole number of frames, or there is none.
    """
    position, frames = 0, 0
    while position < len(data) or not frames:
        magic = _uint(data, position, 4)
        if magic & ~0xF == _SKIPPABLE:
            position += 8 + _uint(data, position + 4, 4)
            if position > len(data):
                raise _cut_off()
            yield position, 0
            continue
        if magic != _MAGIC:
            raise RemoteProtocolError("compressed body: something else where a zstd frame starts")
        frames += 1
        descriptor = _uint(data, position + 4, 1)
        position += 4 + _header_size(descriptor)
        last = False
        while not last:
            header = _uint(data, position, 3)
            last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
            position += 3 + (1 if kind == _RLE else size)
            if last and descriptor & _HAS_CHECKSUM:
                position += 4
            if position > len(data):
                raise _cut_off()
            yield position, _BLOCK_MAX if kind == _COMPRESSED else size


def _header_size(descriptor: int) -> int:
    """Bytes of a frame header from its descriptor on, which is the byte behind the magic number."""
    single_segment = descriptor >> 5 & 1
    content_size = (single_segment, 2, 4, 8)[descriptor >> 6]
    dictionary_id = (0, 1, 2, 4)[descriptor & 3]
    return 1 + (1 - single_segment) + dictionary_id + content_size


def _uint(data: memoryview, position: int, width: int) -> int:
    if position + width > len(data):
        raise _cut_off()
    return int.from_bytes(data[position : position + width], "little")


def _cut_off() -> RemoteProtocolError:
    return RemoteProtocolError("compressed body: ends inside a zstd frame")


@lru_cache(maxsize=64)
def _dictionary(dictionary: bytes | None) -> zstandard.ZstdCompressionDict | None:
    # its first use prepares it, which takes much longer than decoding a small body does
    return None if dictionary is None else _zstd().ZstdCompressionDict(dictionary)


# Preparing a dictionary takes longer than coding a small body with it. A coder works for one thread
# at a time, so each thread has its own.


@lru_cache(maxsize=64)
def _encoder(dictionary: bytes | None, level: int, thread: int) -> Any:
    level = level or _DEFAULT_LEVEL  # what 0 means to zstd, though not to its dictionaries
    prepared = None
    if dictionary is not None:
        prepared = _zstd().ZstdCompressionDict(dictionary)
        prepared.precompute_compress(level=level)
    return _zstd().ZstdCompressor(
        level=level,
        dict_data=prepared,
        write_content_size=False,
        write_checksum=False,
        write_dict_id=False,
    )


@lru_cache(maxsize=64)
def _decoder(dictionary: bytes | None, max_window_size: int, thread: int) -> Any:
    return _zstd().ZstdDecompressor(
        dict_data=_dictionary(dictionary), max_window_size=max_window_size
    )


def _zstd() -> ModuleType:
    try:
        import zstandard
    except ImportError as e:
        raise LocalProtocolError(
            "compression needs zstandard: pip install 'lonelypsc[standard]', or switch it off"
        ) from e
    return zstandard
