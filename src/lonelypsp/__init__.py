"""The lonelyps wire protocol: bytes in, values out. No sockets, no asyncio, no clock."""
