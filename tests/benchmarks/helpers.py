"""Measures the time that the safety checker and the prompt expander add to a request, used and unused.

Sends requests in turn to two ingresses on one Ray: one without helpers, and one with both. The stages answer
immediately. The classifier has ViT-Base's size, and the chat model 34 million parameters. Both have random
weights and run on the CPU. `make benchmark` runs this, or:

    python -m tests.benchmarks.helpers [--rounds 100]
"""

import argparse
import os
import statistics
import tempfile
from functools import partial
from typing import Any

import httpx
import ray
from ray import serve

from deployments.config import ChatModelConfig, ClassifierConfig
from deployments.helpers.chat_model import tiny as chat_model
from deployments.helpers.image_classifier import tiny as image_classifier
from deployments.stages.models import PromptExpander, SafetyChecker
from serve_app.app import Ingress
from serve_app.cluster.status import HELPER
from serve_app.config import AppConfig
from serve_app.generation import prompt_expansion, safety
from tests.benchmarks.edge import BODY, Stage, milliseconds
from tests.serve.conftest import tiny_model

PORT = 18_743
TOKENS = 32
UNCHECKED = {"moderation": "low"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "without helpers": ("plain", {}),
    "with both, neither used": ("helped", UNCHECKED),
    "the image is checked": ("helped", {}),
    f"the prompt is expanded, {TOKENS} tokens": ("helped", UNCHECKED | {"enable_prompt_expansion": True}),
}
"""The ingress and additional request fields of each case, by name."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": 100}
    classifier = ClassifierConfig(
        checkpoint=str(image_classifier.cached(image_classifier.BENCHMARK)), cpu_threads=1
    )
    chat = ChatModelConfig(
        checkpoint=str(chat_model.cached(chat_model.BENCHMARK)), device="cpu", dtype="float32", cpu_threads=1
    )

    def deployed(cls: type[Any], name: str, *args: Any) -> Any:
        return serve.deployment(name=name, **options)(cls).bind(*args)

    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        ray.init(address="local", include_dashboard=False, log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        for name in ("plain", "helped"):
            config: dict[str, Any] = {
                "models": [tiny_model("m")],
                "auth": {"open": True},
                "storage": {"url": f"{folder}/{name}"},
                "database": {"url": f"sqlite:///{folder}/{name}.db"},
            }
            stages = {"m": {stage: deployed(Stage, stage) for stage in ("prior", "decoder")}}
            if name == "helped":
                # Random weights could flag images. This threshold prevents it.
                config["safety_checker"] = {"classifier": classifier.model_dump(), "threshold": 1}
                config["prompt_expander"] = {"chat_model": chat.model_dump(), "max_tokens": TOKENS}
                stages[safety.NAME] = {HELPER: deployed(SafetyChecker, "safety-checker", classifier)}
                expander = deployed(PromptExpander, "prompt-expander", chat)
                stages[prompt_expansion.NAME] = {HELPER: expander}
            whole = serve.deployment(**options)(serve.ingress()(Ingress))
            serve.run(
                whole.bind(AppConfig.model_validate(config), stages), name=name, route_prefix=f"/{name}"
            )
        times: dict[str, list[float]] = {case: [] for case in CASES}
        with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=60) as client:
            for turn in range(rounds + 3):
                for case, (app, fields) in CASES.items():
                    ask = partial(client.post, f"/{app}/v1/images/generations", json=BODY | fields)
                    seconds = milliseconds(ask)
                    if turn >= 3:  # the first ones warm up
                        times[case].append(seconds)
        serve.shutdown()
        ray.shutdown()
    print(f"512x512, {rounds} rounds; milliseconds")
    plain = times["without helpers"]
    for case, measured in times.items():
        added = sorted(one - other for one, other in zip(measured, plain, strict=True))
        low, high = added[rounds // 10], added[-1 - rounds // 10]
        line = f"{case:36} median {statistics.median(measured):7.1f}"
        if measured is not plain:
            line += f"   added {statistics.median(added):7.1f}   (10 %: {low:.1f}, 90 %: {high:.1f})"
        print(line)


if __name__ == "__main__":
    main()
