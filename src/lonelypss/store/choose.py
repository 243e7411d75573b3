"""Which store a configuration asks for."""

from __future__ import annotations

from lonelypss.config import BroadcasterConfig, Database
from lonelypss.store.base import Store
from lonelypss.store.sqlite import SqliteStore


def make_store(config: BroadcasterConfig) -> Store:
    """The store that `config.db` names, not opened.

    Raises:
        ConfigError: `config.db` is no url of a database.
    """
    database = Database.at(config.db)
    if database.is_remote:
        from lonelypss.store.postgres import PostgresStore

        return PostgresStore(config.db, pool_size=config.db_pool_size, timeout=config.db_timeout)
    return SqliteStore(database.path)
