"""Reports of a stage's replica to the demand registry, sent by a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.exceptions import RayError

from deployments.observability.log import FAULT
from deployments.scaling import ANSWER_S, RENEWAL_S, Report, find_registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray.actor import ActorHandle

logger = logging.getLogger("ray.serve")

MIN_REPORT_INTERVAL_S = 0.2
"""Minimum seconds between two reports. A component's tensors load by the thousand."""


class Reporter:
    """Reports the state of this process's Serve replica to the demand registry, until it leaves.

    Attributes:
        measure: called by the thread after every report, at least every few seconds. The next report contains
            its result.
        thread: the thread.
    """

    def __init__(self) -> None:
        self.measure: Callable[[], Report] = dict
        self._measured: Report = {}
        context = serve.get_replica_context()
        self._app_name = context.app_name
        self._id = (context.deployment, context.replica_tag)
        self._registry: ActorHandle[Any] | None = None
        self._state: Callable[[], Report | None] = lambda: None
        self._changed = threading.Event()
        self._is_leaving = False
        self.thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self.thread.start()

    def report(self, state: Callable[[], Report]) -> None:
        """Sets what to report, now and repeatedly. May be called often and from any thread; does not block.

        Args:
            state: returns the replica's state. It is called for every report.
        """
        self._state = state
        self._changed.set()

    def has_ready_sibling(self) -> bool:
        """Returns whether a replica of the same stage is ready. Blocks until the registry answers.

        A replica that has not loaded calls this, so it is another one.
        """
        with suppress(RayError):
            if registry := find_registry(self._app_name):
                reports: Any = ray.get(registry.reports.remote(), timeout=ANSWER_S)
                return any(report["state"] == "ready" for report in reports.get(self._id[0], []))
        return False

    def leave(self) -> None:
        """Removes the replica from the registry and ends the thread. Does not wait for either."""
        self._state = lambda: None
        self._is_leaving = True
        self._changed.set()

    def _run(self) -> None:
        is_last = False
        while not is_last:
            self._changed.wait(RENEWAL_S)
            self._changed.clear()
            is_last = self._is_leaving  # read before the report, so that the last one removes the replica
            for action in (self._send, self._measure):
                try:
                    action()
                except Exception:
                    # A dead thread would make the replica look dead to the registry, for good.
                    logger.exception("the replica's state could not be reported; retrying", extra=FAULT)
            time.sleep(MIN_REPORT_INTERVAL_S)

    def _measure(self) -> None:
        self._measured = self.measure()

    def _send(self) -> None:
        state = self._state()
        report = state and state | self._measured
        try:
            self._registry = self._registry or find_registry(self._app_name)
            if self._registry:
                ray.get(self._registry.report.remote(*self._id, report), timeout=ANSWER_S)
        except RayError:  # the registry does not answer; if it has died, the ingress creates a new one
            self._registry = None
