"""A body on disk to a socket, without its bytes passing through this process (sendfile).

asyncio's own `sendfile` runs on the event loop, which would wait for the disk, and uvloop has none.
This one works beside the transport, on a copy of its file descriptor: a thread hands over as much
as the socket takes, the event loop waits until it takes more.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable

from lonelypsp.spool import Body

_PIECE = 4 * 1024 * 1024
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


async def send_file(transport: asyncio.Transport, body: Body, progress: Callable[[], None]) -> int:
    """Sends `body` from its beginning, for as long as that works.

    Args:
        transport: must have nothing to send, and not be used for sending meanwhile.
        progress: called when something was sent.

    Returns:
        how many bytes were sent. The rest has to go another way: the connection is encrypted, the
        system or the disk cannot do it, or the body is shorter than it should be.

    Raises:
        OSError: of the connection, which its transport will notice, or of the disk.
        ValueError: the body was closed.
    """
    sock = transport.get_extra_info("socket")
    if (
        not body.on_disk
        or sock is None
        or transport.get_extra_info("sslcontext") is not None
        or not hasattr(os, "sendfile")
    ):
        return 0
    loop = asyncio.get_running_loop()
    fd, held, sent = os.dup(sock.fileno()), body.share(), 0

    def release(done: asyncio.Future[int]) -> None:
        os.close(fd)
        held.close()
        if not done.cancelled():
            done.exception()  # seen, even if nobody waits

    work = loop.run_in_executor(None, held.send_at, fd, sent, _PIECE)
    try:
        while True:
            try:
                number = await asyncio.shield(work)
            except BlockingIOError:
                await _writable(loop, fd)
            else:
                sent += number
                progress()
                if sent == body.length or not number:
                    return sent
            work = loop.run_in_executor(None, held.send_at, fd, sent, _PIECE)
    except OSError as e:
        if e.errno in _CANNOT:
            return sent
        raise
    finally:
        # not before the thread is through, or it would write to whoever gets that number next
        if work.done():
            release(work)
        else:
            work.add_done_callback(release)


async def _writable(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_writer(fd, _set, ready)
    try:
        await ready
    finally:
        loop.remove_writer(fd)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
