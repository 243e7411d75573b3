"""Who is guilty of a failure, and how an authorization check can end."""

from __future__ import annotations

from enum import IntEnum


class ProtocolError(Exception):
    """Base of everything the protocol package raises on purpose."""


class LocalProtocolError(ProtocolError):
    """This program asked for something the wire cannot carry, e.g. a topic of 70,000 bytes."""


class RemoteProtocolError(ProtocolError):
    """The peer sent bytes that break the protocol.

    Attributes:
        status: the HTTP status a server answers with.
    """

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Incomplete(RemoteProtocolError):
    """The bytes end before the value does.

    Attributes:
        needed: total number of bytes, from the start, without which decoding cannot get further.
    """

    def __init__(self, message: str, *, needed: int) -> None:
        super().__init__(message)
        self.needed = needed


class AuthResult(IntEnum):
    """How a check of an authorization value ends (docs/topics/protocol.md, "Authorization")."""

    OK = 1
    UNAUTHORIZED = 2
    """A value is required and absent."""
    FORBIDDEN = 3
    """A value is present and wrong, stale, or was used before."""
    UNAVAILABLE = 4
    """The check itself cannot be done now."""

    @property
    def status(self) -> int:
        """HTTP status that answers a request whose check ended like this."""
        return _AUTH_STATUS[self]


_AUTH_STATUS = {
    AuthResult.OK: 200,
    AuthResult.UNAUTHORIZED: 401,
    AuthResult.FORBIDDEN: 403,
    AuthResult.UNAVAILABLE: 503,
}
