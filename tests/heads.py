"""Requests that are wrong in their framing, and what they are answered, at any endpoint.

The ids H01 to H32 are those of our list of bad inputs; letters tell variants apart. What a path and
a method decide (H01 to H08) is with the endpoints, slowness (H29, H30) in test_guard.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """An endpoint, and a body that it takes."""

    path: bytes
    body: bytes

    def request(
        self,
        *headers: bytes,
        line: bytes | None = None,
        host: bytes | None = b"Host: h",
        length: bytes | None = b"",
        body: bytes | None = None,
    ) -> bytes:
        """`length`: the line; empty: the right one; None: none."""
        body = self.body if body is None else body
        lines = [b"POST %b HTTP/1.1" % self.path if line is None else line]
        lines += [] if host is None else [host]
        lines += headers
        if length is not None:
            lines.append(length or b"Content-Length: %d" % len(body))
        return b"\r\n".join([*lines, b"", b""]) + body

    def chunked(self, *headers: bytes, extension: bytes = b"", trailer: bytes = b"") -> bytes:
        chunk = b"%x%b\r\n%b\r\n" % (len(self.body), extension, self.body)
        body = chunk + b"0\r\n" + trailer + b"\r\n"
        return self.request(*headers, CHUNKED, length=None, body=body)


CHUNKED = b"Transfer-Encoding: chunked"


@dataclass(frozen=True)
class Head:
    """One row.

    Attributes:
        make: the bytes.
        statuses: of the answers, in order; a good request is answered 200.
        closes: whether the connection is closed behind the last of them.
    """

    make: Callable[[Target], bytes]
    statuses: tuple[int, ...]
    closes: bool = True


def _length(value: bytes) -> Callable[[Target], bytes]:
    return lambda t: t.request(length=b"Content-Length: " + value)


def _coding(value: bytes) -> Callable[[Target], bytes]:
    return lambda t: t.request(b"Transfer-Encoding: " + value, length=None, body=b"0\r\n\r\n")


def _chunk(body: bytes) -> Callable[[Target], bytes]:
    return lambda t: t.request(CHUNKED, length=None, body=body)


def _version(version: bytes) -> Callable[[Target], bytes]:
    return lambda t: t.request(line=b"POST %b %b" % (t.path, version))


def _lf(before: bytes) -> Callable[[Target], bytes]:
    """The line end behind `before` is a bare LF."""
    return lambda t: t.request(b"X: y").replace(before + b"\r\n", before + b"\n", 1)


HEADS: dict[str, Head] = {
    # what is fine
    "good": Head(lambda t: t.request(), (200,), False),
    "chunked": Head(lambda t: t.chunked(), (200,), False),
    "chunked, another spelling": Head(
        lambda t: t.chunked().replace(b"chunked", b"Chunked"), (200,), False
    ),
    "chunks with extensions": Head(lambda t: t.chunked(extension=b";a=b"), (200,), False),
    "three at once": Head(lambda t: t.request() * 3, (200, 200, 200), False),
    "empty lines before": Head(lambda t: b"\r\n\r\n" + t.request(), (200,), False),
    "absolute target": Head(
        lambda t: t.request(line=b"POST http://h%b HTTP/1.1" % t.path), (200,), False
    ),
    "bytes in a value": Head(lambda t: t.request(b"X: \xff\xfe"), (200,), False),
    "Content_Length is another header": Head(
        lambda t: t.request(b"Content_Length: 3"), (200,), False
    ),
    "close": Head(lambda t: t.request(b"Connection: close"), (200,)),
    "HTTP/1.0": Head(_version(b"HTTP/1.0"), (200,)),
    "HTTP/1.0 without Host": Head(
        lambda t: t.request(line=b"POST %b HTTP/1.0" % t.path, host=None), (200,)
    ),
    "H26 100-continue": Head(lambda t: t.request(b"Expect: 100-continue"), (100, 200), False),
    # length and coding
    "H09": Head(lambda t: t.request(b"Content-Length: 3"), (400,)),
    "H09 the same twice": Head(lambda t: t.request(b"Content-Length: %d" % len(t.body)), (400,)),
    "H09 a list": Head(_length(b"13, 13"), (400,)),
    "H10": Head(lambda t: t.request(CHUNKED), (400,)),
    "H10 the other order": Head(
        lambda t: t.request(CHUNKED, length=b"Content-Length: 5", body=b"0\r\n\r\n"), (400,)
    ),
    "H11": Head(_coding(b"gzip, chunked"), (501,)),
    "H11 not at the end": Head(_coding(b"chunked, gzip"), (400,)),
    "H11 identity": Head(_coding(b"identity"), (501,)),
    "H11 nearly": Head(_coding(b"xchunked"), (501,)),
    "H11 twice": Head(lambda t: t.chunked(CHUNKED), (400,)),
    "H11 a space before the colon": Head(
        lambda t: t.chunked().replace(b"Encoding:", b"Encoding :"), (400,)
    ),
    "H11 in HTTP/1.0": Head(lambda t: t.chunked().replace(b"HTTP/1.1", b"HTTP/1.0"), (400,)),
    "H12": Head(_length(b"-1"), (400,)),
    "H13": Head(_length(b"+5"), (400,)),
    "H14": Head(_length(b"5_0"), (400,)),
    "H14 hexadecimal": Head(_length(b"0x5"), (400,)),
    "H14 no digits": Head(_length(b" "), (400,)),
    "H15": Head(_length(b"18446744073709551616"), (413,)),
    "H16": Head(_chunk(b"10000000000000000\r\n"), (400,)),
    "H16 no number": Head(_chunk(b"xyz\r\n"), (400,)),
    "H16 negative": Head(_chunk(b"-1\r\n"), (400,)),
    "H16 0x": Head(_chunk(b"0x1\r\na\r\n0\r\n\r\n"), (400,)),
    "H16 too much in it": Head(_chunk(b"1\r\nab\r\n0\r\n\r\n"), (400,)),
    "H17": Head(lambda t: t.chunked(extension=b";" + b"x" * 65_536), (400,)),
    "H17 a trailer": Head(lambda t: t.chunked(trailer=b"X: " + b"x" * 65_536 + b"\r\n"), (400,)),
    # lines
    "H18 all": Head(lambda t: t.request().replace(b"\r\n", b"\n"), (400,)),
    "H18 request line": Head(_lf(b"HTTP/1.1"), (400,)),
    "H18 a header": Head(_lf(b"X: y"), (400,)),
    "H18 the end": Head(lambda t: t.request().replace(b"\r\n\r\n", b"\r\n\n"), (400,)),
    "H18 a chunk": Head(_chunk(b"1\na\r\n0\r\n\r\n"), (400,)),
    "H18 CR alone": Head(lambda t: t.request(b"X: a\rY: b"), (400,)),
    "H19": Head(lambda t: t.request(b"X: a\0b"), (400,)),
    "H19 in a name": Head(lambda t: t.request(b"X\0: b"), (400,)),
    "H20": Head(lambda t: t.request(b"X: a\r\n b"), (400,)),
    "H20 at once": Head(lambda t: t.request(host=b" Host: h"), (400,)),
    "no colon": Head(lambda t: t.request(b"X"), (400,)),
    "no name": Head(lambda t: t.request(b": x"), (400,)),
    # sizes
    "just fits": Head(lambda t: t.request(b"X: " + b"x" * 16_000), (200,), False),
    "H21": Head(lambda t: t.request(b"X: " + b"x" * 65_536), (431,)),
    "H21 without an end": Head(lambda t: t.request(b"X: " + b"x" * 65_536)[:60_000], (431,)),
    "H22": Head(lambda t: t.request(*(b"X-%d: x" % n for n in range(300))), (431,)),
    "H23": Head(lambda t: t.request(line=b"POST /%b HTTP/1.1" % (b"x" * 70_000)), (414,)),
    "H23 without an end": Head(lambda t: b"POST /" + b"x" * 70_000, (414,)),
    # the rest
    "H24": Head(lambda t: t.request(host=None), (400,)),
    "H25": Head(lambda t: t.request(b"Host: i"), (400,)),
    "H25 the same": Head(lambda t: t.request(b"Host: h"), (400,)),
    "H27": Head(lambda t: t.request(b"Content-Encoding: gzip"), (415,)),
    "H31": Head(_version(b"HTTP/3.0"), (505,)),
    "H31 2.0": Head(_version(b"HTTP/2.0"), (505,)),
    "H31 0.9": Head(_version(b"HTTP/0.9"), (505,)),
    "H31 none": Head(lambda t: b"POST %b\r\n\r\n" % t.path, (505,)),
    "H31 1.2": Head(_version(b"HTTP/1.2"), (505,)),
    "H31 another": Head(_version(b"ICY/1.1"), (400,)),
    "HTTP/2": Head(lambda t: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400,)),
    "TLS": Head(lambda t: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), (400,)),
    "H32": Head(lambda t: t.request() + b"\0\0\0\r\n\r\n", (200, 400)),
    "H32 behind two": Head(lambda t: t.request() * 2 + b"GET\r\n\r\n", (200, 200, 400)),
    "H32 a bad second": Head(lambda t: t.request() + t.request(host=None), (200, 400)),
    "another protocol": Head(lambda t: t.request(b"Connection: Upgrade", b"Upgrade: h2c"), (400,)),
    "another protocol, asked for": Head(
        lambda t: b"GET /x HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
        (404,),
    ),
    "CONNECT": Head(lambda t: b"CONNECT h:1 HTTP/1.1\r\nHost: h:1\r\n\r\n", (400,)),
    "no path": Head(lambda t: t.request(line=b"POST http://h HTTP/1.1"), (400,)),
    "bytes in the target": Head(lambda t: t.request(line=b"POST /\xff HTTP/1.1"), (400,)),
    "NUL in the target": Head(lambda t: t.request(line=b"POST /\0 HTTP/1.1"), (400,)),
    "a space in the target": Head(lambda t: t.request(line=b"POST /a b HTTP/1.1"), (400,)),
}
