"""Bringing a store to the newest schema version with the Alembic migrations that lie in ``migrations``.

``schema_version`` holds the version for whoever reads it, versions of Unmask before Alembic included; Alembic's own
table follows. The whole upgrade is one transaction: a store has the old tables or the new ones.
"""

import sqlalchemy as sa

from rewards.errors import StoreError

_UPGRADE_LOCK = 0x756E6D61736B  # any number that nobody else takes as an advisory lock


def found_version(connection: sa.Connection) -> int | None:
    """Schema version of the store, None when it has no tables of ours. Raises StoreError for one that is none."""
    if not sa.inspect(connection).has_table("schema_version"):
        return None
    found = connection.execute(sa.text("SELECT version FROM schema_version")).scalar()
    if found is not None and type(found) is not int:  # SQLite keeps anything in any column
        raise StoreError("its schema version is no number: no Unmask made this run store")
    return found


def upgrade(connection: sa.Connection, to: int) -> int | None:
    """Make or upgrade the tables, and commit; the version found afterwards. Leaves a newer store as it is."""
    from alembic import command  # a tenth of a second that processes which only read needn't spend
    from alembic.config import Config

    with connection.begin():
        if connection.dialect.name == "postgresql":  # SQLite's writers begin with the lock
            connection.execute(sa.text("SET LOCAL statement_timeout = 0"))
            connection.execute(sa.text("SET LOCAL lock_timeout = '30s'"))
            connection.execute(sa.text(f"SELECT pg_advisory_xact_lock({_UPGRADE_LOCK})"))
        found = found_version(connection)  # another writer may have been faster
        if found is not None and found >= to:
            return found
        config = Config()
        config.set_main_option("script_location", "services.store:migrations")
        config.attributes["connection"] = connection
        if found is not None and not sa.inspect(connection).has_table("alembic_version"):
            command.stamp(config, str(found))
        command.upgrade(config, str(to))
        return found_version(connection)
