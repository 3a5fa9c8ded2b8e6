"""The identity of a job's model, and the job's turn among the jobs of all keys."""

import sqlalchemy as sa
from alembic import op

revision = "a0001"
down_revision = None


def upgrade() -> None:
    """Add the columns. Jobs that older servers store lack them, and come first."""
    op.add_column("jobs", sa.Column("identity", sa.String(64)))
    op.add_column("jobs", sa.Column("work", sa.Double(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("turn", sa.Double(), nullable=False, server_default="0"))
    op.create_index("jobs_by_turn", "jobs", ["state", "priority", "turn", "seq"])
