"""What the replicas of all our Ray Serve deployments have in common: an engine that is loaded beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic

from deployments.loading import Engine, Loader, Replica

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.config import StageConfig


class Stage(Generic[Engine]):
    """One replica; begins to load its engine at once.

    Args:
        config: where and how it runs.
    """

    async def __init__(self, config: StageConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        self._replica = Replica()
        self._loader = Loader(self._load, cpu_threads=config.cpu_threads, tell=self._replica.tell)
        await self._loader.wait(self._replica.has_ready_sibling)

    def _load(self, report: Callable[[float], None]) -> Engine:
        """Load the engine, in its thread; `report` is told the share of it that is loaded, 0 to 1."""
        raise NotImplementedError

    def check_health(self) -> None:
        """Called by Serve, which replaces the replica when this raises."""
        self._loader.check_health()

    def __del__(self) -> None:
        """Called by Serve when the replica is to go."""
        self._replica.leave()
