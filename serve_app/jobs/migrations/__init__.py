"""The database's tables, by the steps in which they came about: https://alembic.sqlalchemy.org."""
