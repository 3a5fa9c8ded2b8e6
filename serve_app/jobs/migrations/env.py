"""Run by Alembic: takes the steps that the database lacks, in the transaction that it is given."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
