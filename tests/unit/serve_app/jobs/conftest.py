from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deployments.config import ModelConfig
from serve_app.jobs.database import Database
from serve_app.jobs.store import JobStore
from tests.unit.serve_app.jobs.server import Make, Server, Stages
from tests.unit.serve_app.jobs.stored import Open


@pytest.fixture
def store(database_url: str, open_database: Open) -> JobStore:
    return JobStore(open_database(database_url), max_jobs=5, ttl_s=100)


@pytest.fixture
def make(
    database_url: str, open_database: Open, tmp_path: Path, model_config: Callable[..., ModelConfig]
) -> Make:
    """Makes servers that share a database and a file store."""

    def server(stages: Stages | None = None, **options: Any) -> Server:
        database: Database = open_database(database_url)
        return Server(database, tmp_path / "files", model_config(), stages or Stages(), **options)

    return server
