"""The home of a server: the folder of its database and files, unless the configuration names other places.

Each application has its own, so that servers of two configurations do not share one by accident.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve_app.config import AppConfig

ROOT = Path("~/.local/share/glm-image-server")
NAME = "{name}"
"""Stands for the application's name in the two places of a configuration."""


def at_home(config: AppConfig, application: str, *, claims: bool = True) -> AppConfig:
    """Returns the configuration with the application's name in the places of its database and files.

    Version 0.1.0 had one home for all. The first application that starts goes on with it, which includes the
    way back to that version.

    Args:
        config: the configuration.
        application: name of the application.
        claims: whether the application starts. If not, this changes nothing.
    """

    def place(url: str) -> str:
        if str(ROOT / NAME) in url and _inherits(application, claims=claims):
            url = url.replace(str(ROOT / NAME), str(ROOT))
        return url.replace(NAME, application)

    return config.model_copy(
        update={
            "storage": config.storage.model_copy(update={"url": place(config.storage.url)}),
            "database": config.database.model_copy(update={"url": place(config.database.url)}),
        }
    )


def _inherits(application: str, *, claims: bool) -> bool:
    """Returns whether the home of version 0.1.0 is this application's, or would be at its start."""
    root = ROOT.expanduser()
    if not (root / "jobs.db").exists():
        return False
    heir = root / "jobs.db.application"
    if not claims:
        return not heir.exists() or heir.read_text() == application
    with tempfile.NamedTemporaryFile("w", dir=root) as claim:  # the name appears together with its contents
        claim.write(application)
        claim.flush()
        os.fsync(claim.fileno())
        with suppress(FileExistsError):
            heir.hardlink_to(claim.name)
    return heir.read_text() == application
