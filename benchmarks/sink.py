"""A subscriber that costs next to nothing: one process standing for a thousand urls.

It answers every POST to any path with a correctly signed confirmation and does not verify what it
receives, so that a fan-out benchmark measures the broadcaster and not this.

    python benchmarks/sink.py PORT|0 [hex of the 64 byte to-broadcaster key]
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import sys
import time
from typing import cast

import uvloop


class Sink(asyncio.Protocol):
    """HTTP/1.1 as the broadcaster speaks it: Content-Length, no pipelining."""

    key: bytes | None
    origin: bytes

    def __init__(self) -> None:
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head_end = self.buffer.find(b"\r\n\r\n")
        if head_end < 0:
            return
        head = self.buffer[:head_end]
        at = head.lower().index(b"content-length:") + 15
        end = head.find(b"\r\n", at)
        length = int(head[at : end if end > 0 else None])
        body = self.buffer[head_end + 4 :]
        if len(body) < length:
            return
        self.buffer = b""
        path = head[5 : head.index(b" ", 5)]
        self.transport.write(self.reply(path, body))

    def reply(self, path: bytes, body: bytes) -> bytes:
        tracing = int.from_bytes(body[:2], "big")
        topic = int.from_bytes(body[2 + tracing : 4 + tracing], "big")
        at = 4 + tracing + topic
        identifier = body[at : at + 1 + body[at]]
        answer = b"\x00\x08" + self.authorize(identifier, self.origin + path)
        answer += b"\x00\x00" + identifier + b"\x00\x00\x00\x01"
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(answer), answer)

    def authorize(self, identifier: bytes, url: bytes) -> bytes:
        if self.key is None:
            return b"\x00\x00"
        now = int(time.time())
        nonce = b"bench%d" % (time.perf_counter_ns() % 10**9)
        signed = b"\x08" + now.to_bytes(8, "big") + bytes([len(nonce)]) + nonce + b"\x00\x00"
        signed += identifier + b"\x00\x00\x00\x01" + len(url).to_bytes(2, "big") + url
        code = base64.b64encode(hmac.digest(self.key, signed, "sha512"))
        value = b"X-HMAC %d:%b:%b" % (now, nonce, code)
        return len(value).to_bytes(2, "big") + value


async def main(port: int, key: bytes | None) -> None:
    Sink.key = key
    server = await asyncio.get_running_loop().create_server(Sink, "127.0.0.1", port, backlog=4096)
    port = server.sockets[0].getsockname()[1]
    Sink.origin = b"http://127.0.0.1:%d" % port
    print("READY", port, flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), bytes.fromhex(sys.argv[2]) if len(sys.argv) > 2 else None))
