"""Subscribes to a request with fal's client, prints its log, and saves the image as star.jpeg.

Needs: pip install fal-client, and a server by https, the only protocol of this client: make serve TLS=1
"""

import os
import sys
from pathlib import Path

import httpx

# The client reads these variables when it is imported. FAL_RUN_HOST is the server without "https://".
host = os.environ.setdefault("FAL_RUN_HOST", "127.0.0.1:8000")
os.environ.setdefault("FAL_QUEUE_RUN_HOST", f"{host}/queue")
os.environ.setdefault("FAL_KEY", "none")
certificate = Path.home() / ".local/share/glm-image-server/tls/certificate.pem"
if host.startswith(("127.0.0.1", "localhost")) and certificate.exists():  # made by `make serve TLS=1`
    os.environ.setdefault("SSL_CERT_FILE", str(certificate))

import fal_client

shown: list[str] = []


def show(update: fal_client.Status) -> None:
    """Prints the new lines of the log. An update contains the old ones too."""
    if isinstance(update, fal_client.InProgress | fal_client.Completed):
        for line in (update.logs or [])[len(shown) :]:
            print(line["message"])
            shown.append(line["message"])


try:
    result = fal_client.subscribe(
        "fal-ai/glm-image",
        arguments={
            "prompt": "a small red star above a blue circle on a yellow background",
            "image_size": "square",
            "num_inference_steps": 10,
            "seed": 7,
        },
        with_logs=True,
        on_queue_update=show,
    )
except fal_client.FalClientHTTPError as error:
    sys.exit(f"{error.status_code}: {error.message}")
Path("star.jpeg").write_bytes(httpx.get(result["images"][0]["url"]).raise_for_status().content)
print("star.jpeg, seed", result["seed"])
