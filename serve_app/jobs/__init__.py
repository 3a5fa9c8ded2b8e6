"""Jobs: their records, the database, the runner and the webhooks."""
