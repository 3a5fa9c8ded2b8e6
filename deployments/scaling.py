"""Scaling of stages, to zero and back: the demand registry, and Serve's autoscaling policy.

The policy runs in Serve's controller, which may not have this project installed: Ray pickles this module by
value. So the module imports only the standard library and Ray, and processes exchange only plain values.
"""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import ray
import ray.actor
from ray.exceptions import RayError

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ray.actor import ActorHandle
    from ray.serve.config import AutoscalingContext

NAMESPACE = "glm-image-server-2"
"""Ray namespace of the registry. Its number changes with the registry's methods and values, because the
registry of an older version may still run."""
LEASE_S = 10.0
"""Seconds for which an entry in the registry is valid. A process that has died does not renew its entries."""
RENEWAL_S = 2.0
"""Seconds after which an entry is renewed."""
ANSWER_S = 5.0
"""Seconds to wait for an answer of an actor."""
POLL_INTERVAL_S = 1.0
"""Seconds between two checks for an expired need, and between two searches for a registry."""
ORPHANED_S = 60.0
"""Seconds without a policy's call after which the registry ends itself."""

ScalingOrder = tuple[bool, float]
"""Order for a model's stages: whether the model is needed, and the time of its last unload. The time is by
`time.time`, or 0 if there was none. It is a bare tuple, since Serve's controller may lack our classes."""
Report = dict[str, Any]
"""State of a replica. `state` is `loading` with its `progress` (0 to 1), `failed` with its `reason`, or
`ready` with its `done`: tokens generated or denoising steps made, including those of unfinished images.
`device` and `memory` are the last result of `measure_memory`, once there is one."""


class DemandRegistry:
    """Records which models are needed, and the state of each replica of their stages. A Ray actor.

    Ingress replicas and stages write to it. Scaling policies and ingress replicas read from it.

    Args:
        lease_s: seconds for which an entry is valid.
    """

    def __init__(self, lease_s: float = LEASE_S) -> None:
        self._lease_s = lease_s
        self._needs: dict[tuple[str, str], float] = {}
        self._unloaded_at: dict[str, float] = {}
        self._reports: dict[tuple[str, str], tuple[Report, float]] = {}
        self._changed = asyncio.Event()
        self._polled_at = time.monotonic()

    async def need(self, ingress: str, models: list[str]) -> None:
        """Records that an ingress replica has work for these models, and for no others."""
        now = time.monotonic()
        others = {key: until for key, until in self._needs.items() if key[0] != ingress and until > now}
        self._needs = others | {(ingress, model): now + self._lease_s for model in models}
        self._changed.set()

    async def unload(self, models: list[str]) -> None:
        """Orders all replicas of these models to stop, even the minimum. The next need loads them again."""
        self._unloaded_at |= dict.fromkeys(models, time.time())
        # Earlier needs end here. Their ingress may report that only a moment later.
        self._needs = {key: until for key, until in self._needs.items() if key[1] not in models}
        self._changed.set()

    async def order(self, model: str, seen: ScalingOrder | None) -> ScalingOrder:
        """Returns the order for a model's stages as soon as it differs from `seen`, or after a lease."""
        self._polled_at = time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._lease_s):
                while self._order(model) == seen:
                    self._changed.clear()
                    with suppress(TimeoutError):  # a need may expire without a call
                        await asyncio.wait_for(self._changed.wait(), POLL_INTERVAL_S)
        return self._order(model)

    def _order(self, model: str) -> ScalingOrder:
        now = time.monotonic()
        needed = any(name == model and until > now for (_, name), until in self._needs.items())
        return needed, self._unloaded_at.get(model, 0.0)

    async def report(self, deployment: str, replica: str, report: Report | None) -> None:
        """Records the state of a stage's replica. None removes the replica."""
        now = time.monotonic()
        self._reports = {key: value for key, value in self._reports.items() if value[1] > now}
        self._reports.pop((deployment, replica), None)
        if report:
            self._reports[deployment, replica] = (report, now + self._lease_s)

    async def reports(self) -> dict[str, list[Report]]:
        """Returns the valid reports, by deployment."""
        now = time.monotonic()
        valid: dict[str, list[Report]] = {}
        for (deployment, _), (report, until) in self._reports.items():
            if until > now:
                valid.setdefault(deployment, []).append(report)
        return valid

    async def watch(self) -> None:
        """Ends the actor when the application is gone: when no policy has called `order` for `ORPHANED_S`."""
        while time.monotonic() - self._polled_at < ORPHANED_S:  # noqa: ASYNC110 - waits for silence
            await asyncio.sleep(self._lease_s)
        ray.actor.exit_actor()


def find_registry(app_name: str) -> ActorHandle[Any] | None:
    """Returns the application's registry, or None if there is none yet. Blocks until Ray answers."""
    try:
        return ray.get_actor(app_name, namespace=NAMESPACE)
    except ValueError:
        return None


class ScalingPolicy:
    """Decides how many replicas a stage has. An autoscaling policy of Ray Serve.

    There are as many replicas as the load needs, and at least one while the model is needed. So both stages
    load together, and neither stops while the other one works. Spare replicas stop after the idle time.

    Serve's own bounds are zero and the maximum. The minimum is enforced here, because a model that was
    unloaded by hand stays unloaded until it is needed.

    Args:
        model: name of the model.
        min_replicas: replicas to keep when the model is not needed.
        idle_timeout_s: seconds after which a spare replica stops.
    """

    def __init__(self, model: str, min_replicas: int, idle_timeout_s: float) -> None:
        self._model = model
        self._min_replicas = min_replicas
        self._idle_timeout_s = idle_timeout_s
        self._registry: ActorHandle[Any] | None = None
        self._searched_at = float("-inf")
        self._answer: Future[ScalingOrder] | None = None
        self._order: ScalingOrder | None = None
        self._unloaded_at: float | None = None  # time of the last unload that was obeyed
        self._unloading = False  # whether replicas of that unload are left
        self._asleep = False  # whether the minimum is waived, from an unload to the next need
        self._spare_since: float | None = None  # since when there are more replicas than needed
        self._most_wanted = 0  # most replicas wanted within that time

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Returns the number of replicas. Serve's controller calls this ten times a second.

        It blocks on nothing but `find_registry`.
        """
        self._poll_registry(context.app_name or "")
        needed, unloaded_at = self._order or (False, 0.0)
        target = context.config.target_ongoing_requests if context.config else 1
        replicas = self.decide(
            load=context.total_num_requests / target,
            replicas=context.target_num_replicas,
            running=context.current_num_replicas,
            needed=needed,
            unloaded_at=unloaded_at,
            now=time.monotonic(),
        )
        return replicas, {}

    def decide(
        self, *, load: float, replicas: int, running: int, needed: bool, unloaded_at: float, now: float
    ) -> int:
        """Returns the number of replicas that the stage should have.

        Args:
            load: requests, running and waiting, divided by the target of one replica.
            replicas: result of the last decision.
            running: replicas that have finished loading.
            needed: whether an ingress has work for the model.
            unloaded_at: time of the model's last unload, 0 without one. Clocks may be set back, so that any
                other time is a new unload.
            now: time in seconds, on any clock.
        """
        if unloaded_at and unloaded_at != self._unloaded_at:
            self._unloaded_at = unloaded_at
            self._unloading = self._asleep = True
        if self._unloading and replicas:
            self._unloading = replicas > 1  # Serve scales to one before it scales to zero
            return 0
        self._unloading = False
        wanted = max(math.ceil(load), int(needed))
        if self._asleep and not wanted:
            return 0
        self._asleep = False
        wanted = max(wanted, self._min_replicas)
        if wanted >= replicas or not running:  # a stage that is still loading is not idle
            self._spare_since = None
            return max(wanted, replicas)
        if self._spare_since is None:
            self._spare_since, self._most_wanted = now, 0
        self._most_wanted = max(self._most_wanted, wanted)
        if now - self._spare_since < self._idle_timeout_s:
            return replicas
        if self._most_wanted:  # else Serve scales to one first, and asks again
            self._spare_since = None
        return self._most_wanted

    def _poll_registry(self, app_name: str) -> None:
        """Takes the registry's answer if it has come, and requests the next one."""
        if self._answer and self._answer.done():
            try:
                order = self._answer.result()
                if self._unloaded_at is None:  # an unload from before this policy's time is over
                    self._unloaded_at = order[1]
                self._order = order
            except RayError:
                self._registry = self._order = None
            self._answer = None
        now = time.monotonic()
        if self._registry is None and now - self._searched_at > POLL_INTERVAL_S:
            self._searched_at = now
            self._registry = find_registry(app_name)
        if self._registry and not self._answer:
            self._answer = self._registry.order.remote(self._model, self._order).future()
