"""The items of an examination, in their order."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from serve_app.cli import config_file, gpus
from serve_app.cli.doctor import checkpoints, configuration, machine, storage
from serve_app.cli.doctor.findings import checked, fault, fine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from serve_app.cli.config_file import ServeFile
    from serve_app.cli.doctor.findings import Finding

GPU_PATIENCE_S = gpus.TIMEOUT_S + 5
"""Seconds that the driver may take. On a machine with many GPUs, its first answer is slow."""


def examine(path: Path | None, *, hashes: bool) -> Iterator[Finding]:
    """Yields the findings about this machine and a configuration.

    Args:
        path: the config file, or None.
        hashes: whether all weights are compared with their SHA-256.
    """
    yield from checked("system", machine.system)
    yield from checked("packages", machine.packages)
    yield from checked("memory", machine.memory)
    yield from checked("disks", machine.disks)
    file: ServeFile | None = None
    if path:
        try:
            file, warnings = config_file.read(path)
        except config_file.ConfigFileError as error:
            yield from (fault(f"{path}: {problem}", "correct the file") for problem in error.problems)
        else:
            yield from (fine(f"{path}: {warning}") for warning in warnings)
            yield fine(f"{path} is valid")
    config = file.application.args if file else None
    yield from checked("GPUs", partial(machine.graphics, config), GPU_PATIENCE_S)
    if file and config:
        yield from checked("port", partial(configuration.address, file.http_options))
        yield from checked("certificate", partial(configuration.certificate, file.http_options))
        yield from checked("keys", partial(configuration.keys, config, file.http_options.host))
        yield from checked("database", partial(storage.database, file.application))
        yield from checked("files", partial(storage.files, file.application))
        for place in checkpoints.places(config):
            yield from checked(place.name, partial(checkpoints.state, place))
            if hashes:
                yield from checked(place.name, partial(checkpoints.hashes, place), patience_s=None)
