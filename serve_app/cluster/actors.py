"""Actors that all ingress replicas of an application share."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deployments.scaling import ANSWER_S

if TYPE_CHECKING:
    from ray.actor import ActorHandle


class ActorClient:
    """An ingress replica's client of an actor. Creates the actor, and replaces it if it has died.

    The actor runs on the ingress's node, reserves no resources, and outlives the ingress. Ray does not
    restart it: Ray might choose a node with a GPU, and that node could then not be released. It ends itself
    when its method `watch` finds that the application is gone.

    Args:
        cls: class of the actor, whose constructor needs no arguments.
        app_name: name of the Serve application, and of the actor.
        namespace: Ray namespace of the actor. It must change with the class's methods and values, because an
            actor of an older version may still run.
    """

    def __init__(self, cls: type[Any], app_name: str, namespace: str) -> None:
        self._cls = cls
        self._names = {"name": app_name, "namespace": namespace}
        self._actor = self._create()

    async def ask(self, method: str, *args: Any) -> Any:
        """Calls a method of the actor and returns its result.

        Raises:
            RayError: the actor has died. The next call goes to a new and empty one.
            TimeoutError: the actor does not answer.
        """
        try:
            async with asyncio.timeout(ANSWER_S):
                return await getattr(self._actor, method).remote(*args)
        except RayActorError:
            self._actor = self._create()
            raise

    def tell(self, method: str, *args: Any) -> None:
        """Calls a method of the actor and does not wait for it. Nothing says that the actor has died."""
        getattr(self._actor, method).remote(*args)

    def _create(self) -> ActorHandle[Any]:
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options: dict[str, Any] = self._names | {"get_if_exists": True, "lifetime": "detached"}
        options |= {"num_cpus": 0, "scheduling_strategy": node}
        actor = cast("ActorHandle[Any]", ray.remote(self._cls).options(**options).remote())
        actor.watch.remote()
        return actor
