"""Kept for older imports; see `lonelypsp.signing`."""

from lonelypsp.errors import AuthResult
from lonelypsp.signing import AuthConfig

AuthConfigFromParts = AuthConfig
"""(to_broadcaster, to_subscriber): in this order here, other than in `lonelypsc.config`."""

__all__ = ["AuthConfig", "AuthConfigFromParts", "AuthResult"]
