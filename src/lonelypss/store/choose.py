"""Which store a configuration asks for."""

from __future__ import annotations

from lonelypss.config import BroadcasterConfig, Database
from lonelypss.store.base import Quotas, Store
from lonelypss.store.sqlite import SqliteStore


def make_store(config: BroadcasterConfig) -> Store:
    """The store that `config.db` names, not opened.

    Raises:
        ConfigError: `config.db` is no url of a database.
    """
    database = Database.at(config.db)
    quotas = Quotas(config.max_subscriptions_per_url, config.max_subscriptions_per_origin)
    if database.is_remote:
        from lonelypss.store.postgres import PostgresStore

        return PostgresStore(
            config.db,
            pool_size=config.db_pool_size,
            timeout=config.db_timeout,
            quotas=quotas,
        )
    return SqliteStore(database.path, quotas=quotas)
