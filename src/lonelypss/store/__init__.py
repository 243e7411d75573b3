"""Where subscriptions and undelivered notices are kept: the contract and what is common to all."""

from lonelypss.store.base import (
    Kind,
    MissedNotice,
    OverQuota,
    Quotas,
    Store,
    StoreCorrupt,
    StoreUnavailable,
    Subscription,
)

__all__ = [
    "Kind",
    "MissedNotice",
    "OverQuota",
    "Quotas",
    "Store",
    "StoreCorrupt",
    "StoreUnavailable",
    "Subscription",
]
