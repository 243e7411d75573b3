"""Where subscriptions and undelivered notices are kept: the contract and what is common to all."""

from lonelypss.store.base import (
    Kind,
    MissedNotice,
    Store,
    StoreCorrupt,
    StoreUnavailable,
    Subscription,
)

__all__ = [
    "Kind",
    "MissedNotice",
    "Store",
    "StoreCorrupt",
    "StoreUnavailable",
    "Subscription",
]
