#!/usr/bin/env bash
# Ray can lose a cancellation for good: the call of an actor runs to its end although ray.cancel came in time.
#
# The documentation calls ray.cancel best effort, and Ray repeats a cancellation that arrives before its call. But
# there is a moment at which an asynchronous actor has accepted a call and its coroutine does not run yet. A
# cancellation in that moment is confirmed and has no effect, so Ray does not repeat it. The moment is short. It is
# met about once in fifteen times if the actor's process was paused while the call and its cancellation were sent, as a
# debugger or a frozen container pauses it. Without a pause it was not met in 600 calls. Whoever must be sure that
# work has stopped needs a way of their own to ask for it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "ray==2.60.0"
cd "$folder"
RAY_TMPDIR="$folder" venv/bin/python - <<'PYTHON'
import asyncio
import logging
import os
import signal
import time
from collections import Counter

import ray

CALLS = 100


@ray.remote(max_concurrency=10, num_cpus=0)
class Worker:
    def __init__(self):
        self.ends = {}

    async def pid(self):
        return os.getpid()

    async def work(self, call):
        try:
            for i in range(60):
                await asyncio.sleep(0.05)
                yield i
        except asyncio.CancelledError:
            self.ends[call] = "cancelled while it ran"
            raise
        self.ends[call] = "ran to its end"

    async def end(self, call):
        return self.ends.get(call, "cancelled before it ran")


print("ray", ray.__version__)
ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
worker = Worker.remote()
pid = ray.get(worker.pid.remote())
ends = Counter()
for call in range(CALLS):
    os.kill(pid, signal.SIGSTOP)
    items = worker.work.options(num_returns="streaming").remote(call)
    time.sleep(0.3)
    ray.cancel(items)
    time.sleep(0.3)
    os.kill(pid, signal.SIGCONT)
    try:
        for item in items:
            ray.get(item)
    except ray.exceptions.RayError:
        pass
    ends[ray.get(worker.end.remote(call))] += 1
ray.shutdown()
print(f"{CALLS} calls, each cancelled before the actor could begin:")
for end, count in ends.items():
    print(f"  {count} {end}")
assert ends["ran to its end"], "no cancellation was lost: the behaviour has changed"
PYTHON
