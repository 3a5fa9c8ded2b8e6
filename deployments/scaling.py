"""Scaling a stage, down to none and back: the gate, where it is known who needs a model, and the policy.

Serve's controller runs the policy, and may have none of this project: Ray pickles the module by value. So it
imports the standard library and Ray, and what passes between the processes is plain.
"""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import ray
import ray.actor
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ray.actor import ActorHandle
    from ray.serve.config import AutoscalingContext

NAMESPACE = "glm-image-server-1"
"""The number changes with what is passed through a gate: an older application's may still be there."""
LEASE_S = 10.0
"""What an ingress or a stage's replica says holds so long: one that died says nothing more."""
RENEWAL_S = 2.0
ANSWER_S = 5.0
LOOK_AGAIN_S = 1.0
ALONE_S = 60.0

Orders = tuple[bool, float]
"""Whether the model is needed, and when, by `time.time`, it was last told to unload; 0 for never."""
Report = dict[str, Any]
"""A replica's `state`: `loading` with its `progress` (0 to 1), `failed` with its `reason`, or `ready` with
how much it has `done`: tokens drawn, or denoising steps made, even if no image came of them."""


class Gate:
    """What ingress, stages and policies of one application tell one another. A Ray actor.

    Args:
        lease_s: how long what was said holds.
    """

    def __init__(self, lease_s: float = LEASE_S) -> None:
        self._lease_s = lease_s
        self._needs: dict[tuple[str, str], float] = {}
        self._unloaded_at: dict[str, float] = {}
        self._reports: dict[tuple[str, str], tuple[Report, float]] = {}
        self._changed = asyncio.Event()
        self._asked_at = time.monotonic()

    async def need(self, ingress: str, models: list[str]) -> None:
        """An ingress replica has work for these models, and for no others."""
        now = time.monotonic()
        others = {key: until for key, until in self._needs.items() if key[0] != ingress and until > now}
        self._needs = others | {(ingress, model): now + self._lease_s for model in models}
        self._changed.set()

    async def unload(self, models: list[str]) -> None:
        """These models' replicas are to go at once, whatever the minimum; the next need loads them again."""
        self._unloaded_at |= dict.fromkeys(models, time.time())
        # What was needed up to now is not any more, though its ingress may say so only in a moment.
        self._needs = {key: until for key, until in self._needs.items() if key[1] not in models}
        self._changed.set()

    async def orders(self, model: str, seen: Orders | None) -> Orders:
        """What a model's stages are to do, as soon as that is not what was `seen`, or after a lease."""
        self._asked_at = time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._lease_s):
                while self._orders(model) == seen:
                    self._changed.clear()
                    with suppress(TimeoutError):  # a need may lapse without a word
                        await asyncio.wait_for(self._changed.wait(), LOOK_AGAIN_S)
        return self._orders(model)

    def _orders(self, model: str) -> Orders:
        now = time.monotonic()
        needed = any(name == model and until > now for (_, name), until in self._needs.items())
        return needed, self._unloaded_at.get(model, 0.0)

    async def report(self, deployment: str, replica: str, report: Report | None) -> None:
        """A stage's replica tells how it is, or that it goes."""
        now = time.monotonic()
        self._reports = {key: value for key, value in self._reports.items() if value[1] > now}
        self._reports.pop((deployment, replica), None)
        if report:
            self._reports[deployment, replica] = (report, now + self._lease_s)

    async def reports(self) -> dict[str, list[Report]]:
        """What the replicas of each deployment have told of late."""
        now = time.monotonic()
        told: dict[str, list[Report]] = {}
        for (deployment, _), (report, until) in self._reports.items():
            if until > now:
                told.setdefault(deployment, []).append(report)
        return told

    async def watch(self) -> None:
        """End the actor when the application has gone: no policy has asked for a minute."""
        while time.monotonic() - self._asked_at < ALONE_S:  # noqa: ASYNC110 - it is the silence that counts
            await asyncio.sleep(self._lease_s)
        ray.actor.exit_actor()


def find_gate(app_name: str) -> ActorHandle[Any] | None:
    """The application's gate, if its ingress has created it. Asks Ray, and waits for the answer."""
    try:
        return ray.get_actor(app_name, namespace=NAMESPACE)
    except ValueError:
        return None


class GateKeeper:
    """The application's gate for its ingress, which creates it, and again if it has died.

    It is on the ingress's node, takes nothing of the cluster's, and outlives the ingress. Ray does not start
    it again, since it might do so on a node with a GPU, which would not be given back then.
    """

    def __init__(self, app_name: str) -> None:
        self._app_name = app_name
        self._gate = self._create()

    async def ask(self, method: str, *args: Any) -> Any:
        """Call a method of the gate's.

        Raises:
            RayError: it has died; the next call goes to a new one, which knows nothing yet.
            TimeoutError: it does not answer.
        """
        try:
            async with asyncio.timeout(ANSWER_S):
                return await getattr(self._gate, method).remote(*args)
        except RayActorError:
            self._gate = self._create()
            raise

    def _create(self) -> ActorHandle[Any]:
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options: dict[str, Any] = {"name": self._app_name, "namespace": NAMESPACE, "get_if_exists": True}
        options |= {"lifetime": "detached", "num_cpus": 0, "scheduling_strategy": node}
        gate = cast("ActorHandle[Any]", ray.remote(Gate).options(**options).remote())
        gate.watch.remote()
        return gate


class ScalingPolicy:
    """How many replicas a stage is to have; an autoscaling policy of Ray Serve's.

    There are as many as the load asks for, and one at least while the model is needed, so that both stages
    load together and neither goes while the other one works. Those that have not been needed for the idle
    time go. Serve's own bounds are zero and the maximum: the minimum is kept here, since a model that was
    unloaded by hand is to stay so until it is needed.

    Args:
        model: by its name.
        min_replicas: kept, needed or not.
        idle_timeout_s: how long a replica is kept that is not needed.
    """

    def __init__(self, model: str, min_replicas: int, idle_timeout_s: float) -> None:
        self._model = model
        self._min_replicas = min_replicas
        self._idle_timeout_s = idle_timeout_s
        self._gate: ActorHandle[Any] | None = None
        self._looked_at = float("-inf")
        self._answer: Future[Orders] | None = None
        self._orders: Orders | None = None
        self._unloaded_at = 0.0
        self._unloading = False
        self._asleep = False
        self._spare_since: float | None = None
        self._most_wanted = 0

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Called by Serve's controller ten times a second; waits for nothing but `find_gate`."""
        self._read_orders(context.app_name or "")
        needed, unloaded_at = self._orders or (False, self._unloaded_at)
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
        """How many replicas there are to be.

        Args:
            load: requests, running and waiting, in parts of what one replica is to have.
            replicas: how many there are to be by the last decision.
            running: how many of them have loaded.
            needed: whether an ingress has work for the model.
            unloaded_at: when the model was last told to unload; larger is later.
            now: on a clock of seconds.
        """
        if unloaded_at > self._unloaded_at:
            self._unloaded_at = unloaded_at
            self._unloading = self._asleep = True
        if self._unloading and replicas:
            self._unloading = replicas > 1  # Serve goes to one before it goes to none
            return 0
        self._unloading = False
        wanted = max(math.ceil(load), int(needed))
        if self._asleep and not wanted:
            return 0
        self._asleep = False
        wanted = max(wanted, self._min_replicas)
        if wanted >= replicas or running < replicas:  # what has not loaded yet cannot be idle
            self._spare_since = None
            return max(wanted, replicas)
        if self._spare_since is None:
            self._spare_since, self._most_wanted = now, 0
        self._most_wanted = max(self._most_wanted, wanted)
        if now - self._spare_since < self._idle_timeout_s:
            return replicas
        if self._most_wanted:  # else Serve goes to one first, and asks again
            self._spare_since = None
        return self._most_wanted

    def _read_orders(self, app_name: str) -> None:
        """Take the gate's answer if it has come, and ask for the next one."""
        if self._answer and self._answer.done():
            try:
                orders = self._answer.result()
                if self._orders is None:  # what was told before this policy began is over
                    self._unloaded_at = orders[1]
                self._orders = orders
            except RayError:
                self._gate = self._orders = None
            self._answer = None
        now = time.monotonic()
        if self._gate is None and now - self._looked_at > LOOK_AGAIN_S:
            self._looked_at = now
            self._gate = find_gate(app_name)
        if self._gate and not self._answer:
            self._answer = self._gate.orders.remote(self._model, self._orders).future()
