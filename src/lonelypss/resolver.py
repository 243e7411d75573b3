"""Names of subscribers to addresses, in a few threads of their own.

A name server that does not answer holds a thread for half a minute, and would hold the disk and the
database as well if they shared it. Threads are daemons: a lookup must not delay the end of the
program. Everybody who asks for the same name meanwhile waits for the same answer.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from functools import partial

from lonelypss.urlpolicy import Address

MAX_ASKED = 4096
"""Names that are being looked up or wait for it."""


class Resolver:
    """`await resolver(name)` gives all addresses of a name.

    Args:
        threads: how many names are looked up at one time; others wait.
    """

    def __init__(self, threads: int) -> None:
        self._free = asyncio.Semaphore(threads)
        self._asked: dict[str, asyncio.Task[list[Address]]] = {}

    async def __call__(self, name: str) -> list[Address]:
        """Raises OSError: it has none, or nobody could be asked."""
        task = self._asked.get(name)
        if task is None:
            if len(self._asked) >= MAX_ASKED:
                raise OSError(f"{MAX_ASKED} names are being looked up, see outgoing_dns_threads")
            task = self._asked[name] = asyncio.create_task(self._ask(name), name=f"resolve {name}")
            task.add_done_callback(partial(self._asked_for, name))
        return await asyncio.shield(task)  # others may wait for it, too

    def _asked_for(self, name: str, task: asyncio.Task[list[Address]]) -> None:
        del self._asked[name]
        if not task.cancelled():
            task.exception()  # perhaps nobody waits for it any more

    async def close(self) -> None:
        """Gives up what is being asked."""
        tasks = list(self._asked.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, name: str) -> list[Address]:
        async with self._free:
            loop = asyncio.get_running_loop()
            answer: asyncio.Future[list[Address]] = loop.create_future()
            thread = threading.Thread(
                target=_look_up, args=(name, loop, answer), name=f"resolve {name}", daemon=True
            )
            thread.start()
            return await answer


def _look_up(
    name: str, loop: asyncio.AbstractEventLoop, answer: asyncio.Future[list[Address]]
) -> None:
    found: list[Address] | OSError
    try:
        rows = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        found = [ipaddress.ip_address(row[4][0]) for row in rows]
    except (OSError, UnicodeError) as e:
        found = e if isinstance(e, OSError) else OSError(str(e))
    try:
        loop.call_soon_threadsafe(_tell, answer, found)
    except RuntimeError:
        pass  # the loop is gone, and whoever asked with it


def _tell(answer: asyncio.Future[list[Address]], found: list[Address] | OSError) -> None:
    if answer.cancelled():
        return
    if isinstance(found, OSError):
        answer.set_exception(found)
    else:
        answer.set_result(found)
