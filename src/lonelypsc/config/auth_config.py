"""Which authenticator judges what arrives, and which signs what leaves."""

from __future__ import annotations

from lonelypsp.errors import AuthResult
from lonelypsp.signing import AuthConfig, Authenticator

__all__ = ["AuthConfig", "AuthConfigFromParts", "AuthResult", "Authenticator"]


def AuthConfigFromParts(
    incoming: Authenticator | None = None,
    outgoing: Authenticator | None = None,
    *,
    to_broadcaster: Authenticator | None = None,
    to_subscriber: Authenticator | None = None,
) -> AuthConfig:
    """Both directions as one value.

    Args:
        incoming: judges what broadcasters send to us; also spelled `to_subscriber`.
        outgoing: signs what we send to broadcasters; also spelled `to_broadcaster`.

    Raises:
        TypeError: a direction is missing, or given twice.
    """
    incoming = _one("incoming", incoming, "to_subscriber", to_subscriber)
    outgoing = _one("outgoing", outgoing, "to_broadcaster", to_broadcaster)
    return AuthConfig(to_broadcaster=outgoing, to_subscriber=incoming)


def _one(
    name: str, value: Authenticator | None, alias: str, other: Authenticator | None
) -> Authenticator:
    if (value is None) == (other is None):
        raise TypeError(f"give exactly one of {name} and {alias}")
    found = other if value is None else value
    assert found is not None
    return found
