# The server, for one machine (see compose.yaml) and for every pod on Kubernetes (see k8s/README.md).
#
#   docker build -t glm-image-server:0.2.0-ray2.60.0 .
#   docker build -t glm-image-server:0.2.0-ray2.60.0-cpu --build-arg TORCH_INDEX=ADDRESS .
#
# The second one is for machines without NVIDIA GPUs, and some gigabytes smaller; ADDRESS is the one that pytorch.org
# shows for Pip and CPU. There are no weights in either but the demo's.

# The Python with which requirements.lock was chosen and the tests run. All nodes of a Ray cluster need the same one.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY requirements.lock /tmp/
# PyTorch first, and without what it needs, which the lock has: of the version that stands there pip keeps this build.
ARG TORCH_INDEX=""
# hadolint ignore=DL3013
RUN if [ -n "$TORCH_INDEX" ]; then \
      torch="$(grep -o '^torch==[^ ]*' /tmp/requirements.lock)" && \
      pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX" "$torch"; \
    fi && \
    pip install --no-cache-dir --requirement /tmp/requirements.lock

FROM python:${PYTHON}-slim
# g++ compiles what torch.compile writes; KubeRay's probes are made with bash and wget.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends g++ wget && \
    rm -rf /var/lib/apt/lists/* && \
    useradd --uid 1000 --create-home --shell /bin/bash app && \
    install --directory --owner app --group app /models /home/app/.local/share/glm-image-server \
      /home/app/.cache /home/app/.cache/glm-image-server /home/app/.cache/glm-image-server/compiled
COPY --from=build /opt/venv /opt/venv
WORKDIR /app
COPY LICENSE ./
COPY deployments deployments
COPY serve_app serve_app
COPY configs configs
# Python finds the project in /app from any folder, as Ray's processes need it. Ray reports home unless told not to.
# The callback is what sets up Ray Serve's proxies (serve_app/http/proxy.py).
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve_app.http.proxy:configure
LABEL org.opencontainers.image.title="GLM-Image server" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.licenses="Apache-2.0"
# By its number, so that Kubernetes can see that it is not root.
USER 1000
EXPOSE 8000
# Whether the process lives; it takes a minute to start. On Kubernetes KubeRay's probes stand in for this.
HEALTHCHECK --interval=10s --timeout=5s --start-period=2m --retries=3 \
  CMD ["wget", "--quiet", "--tries=1", "--timeout=4", "--output-document=/dev/null", "http://127.0.0.1:8000/livez"]
# The demo, for those who share the container's network alone; KubeRay and compose.yaml run something else.
CMD ["python", "-m", "serve_app", "serve", "configs/demo.yaml"]
