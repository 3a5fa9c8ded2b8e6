"""The services that routes use."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve_app.background import Background
from serve_app.files.uploads import Uploads
from serve_app.generation.delivery import Delivery
from serve_app.jobs.runner import JobRunner
from serve_app.jobs.signing import Signer
from serve_app.jobs.store import JobStore
from serve_app.jobs.submission import Submitter
from serve_app.observability.gauges import Gauges
from serve_app.observability.recent import Recent

if TYPE_CHECKING:
    from fastapi import Request

    from serve_app.cluster.lifecycle import Lifecycle
    from serve_app.config import AppConfig
    from serve_app.files.store import FileStore
    from serve_app.generation.generator import Generator
    from serve_app.jobs.database import Database
    from serve_app.outbound import Outbound


@dataclass(frozen=True, kw_only=True)
class Services:
    """Everything that a route may use.

    Attributes:
        config: the configuration.
        generator: makes images.
        delivery: makes images and puts them into answers.
        lifecycle: loads and unloads models.
        files: keeps files.
        uploads: takes source images ahead of their requests.
        database: the database.
        jobs: keeps jobs.
        submitter: enqueues jobs.
        runner: runs, cancels and purges jobs.
        signer: signs webhooks and upload URLs.
        outbound: opens connections for users.
        gauges: sets the gauges.
        recent: has the last errors, and the work of requests.
        background: runs periodic tasks.
    """

    config: AppConfig
    generator: Generator
    delivery: Delivery
    lifecycle: Lifecycle
    files: FileStore
    uploads: Uploads
    database: Database
    jobs: JobStore
    submitter: Submitter
    runner: JobRunner
    signer: Signer
    outbound: Outbound
    gauges: Gauges
    recent: Recent
    background: Background

    @classmethod
    def of(
        cls,
        config: AppConfig,
        generator: Generator,
        lifecycle: Lifecycle,
        files: FileStore,
        database: Database,
        outbound: Outbound,
    ) -> Services:
        """Returns the services of a server whose main parts are given."""
        limits, background, submitted = config.limits, Background(), asyncio.Event()
        jobs = JobStore(database, max_jobs=limits.max_jobs, ttl_s=config.storage.ttl_s)
        signer = Signer(database)
        return cls(
            config=config,
            generator=generator,
            delivery=Delivery(generator, files),
            lifecycle=lifecycle,
            files=files,
            uploads=Uploads(files, signer, limits.max_image_bytes),
            database=database,
            jobs=jobs,
            submitter=Submitter(jobs, generator, files, outbound, submitted),
            runner=JobRunner(jobs, generator, files, submitted, background),
            signer=signer,
            outbound=outbound,
            gauges=Gauges(generator, jobs, files),
            recent=Recent(),
            background=background,
        )

    def base(self, request: Request) -> str:
        """Returns the base of the URLs in an answer, without a final slash."""
        return str(self.config.public_url or request.base_url).rstrip("/")
