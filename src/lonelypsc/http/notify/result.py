"""Kept for older imports."""

from lonelypsc.client import PubSubNotifyResult as HttpPubSubNotifyResult

__all__ = ["HttpPubSubNotifyResult"]
