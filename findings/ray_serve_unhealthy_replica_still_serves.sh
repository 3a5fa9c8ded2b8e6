#!/usr/bin/env bash
# A replica of Ray Serve whose health check fails still gets requests, until the check has failed three times.
#
# Serve replaces a replica only after several failed checks in a row, one each health_check_period_s. Until then
# the handle sends requests to it as to any other. A replica that knows that it is broken, for example because its
# GPU is lost, must end its process instead: then callers get an error at once, and Serve starts another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "ray[serve]==2.60.0"
cd "$folder"
RAY_TMPDIR="$folder" venv/bin/python - <<'PYTHON'
import logging
import time

import ray
from ray import serve

PERIOD_S = 1.0


@serve.deployment(health_check_period_s=PERIOD_S, ray_actor_options={"num_cpus": 0})
class Broken:
    def __init__(self):
        self.failed_checks = 0
        self.is_broken = False

    def break_down(self):
        self.is_broken = True

    def check_health(self):
        if self.is_broken:
            self.failed_checks += 1
            raise RuntimeError("the device is lost")

    def __call__(self):
        return self.is_broken, self.failed_checks


print("ray", ray.__version__)
ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
serve.start(proxy_location="Disabled")
handle = serve.run(Broken.bind())
handle.break_down.remote().result()
began = time.monotonic()
served, checks = 0, 0
while time.monotonic() - began < 60:
    try:
        is_broken, failed = handle.remote().result(timeout_s=10)
    except Exception:
        break
    if not is_broken:
        break
    served, checks = served + 1, failed
    time.sleep(0.05)
seconds = time.monotonic() - began
serve.shutdown()
ray.shutdown()
print(f"checked each {PERIOD_S:g} s; after it broke, it served {served} requests in {seconds:.1f} s,")
print(f"the last one after {checks} failed checks")
assert served > 5 and checks >= 2, "the behaviour has changed"
PYTHON
