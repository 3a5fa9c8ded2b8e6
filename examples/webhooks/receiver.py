"""Receives the webhooks of jobs: checks signature and time, ignores repeats, and prints each job.

Needs: pip install cryptography httpx. Listens at http://127.0.0.1:9000/; submit.sh sends it a job.
"""

import base64
import json
import os
import time
from binascii import Error as NotBase64
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

SERVER = os.environ.get("SERVER", "http://127.0.0.1:8000")
PORT = int(os.environ.get("PORT", "9000"))
MAX_AGE_S = 300
MAX_BYTES = 2**26

keys = [
    Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(key["x"] + "="))
    for key in httpx.get(f"{SERVER}/.well-known/jwks.json").raise_for_status().json()["keys"]
]
handled: set[str] = set()  # a real receiver keeps these ids where it keeps its own records


def is_signed(content: bytes, signatures: str) -> bool:
    """Returns whether one of the signatures, such as `v1a,BASE64 v1a,BASE64`, is the server's."""
    for version, _, signature in (entry.partition(",") for entry in signatures.split()):
        for key in keys if version == "v1a" else []:
            try:
                key.verify(base64.b64decode(signature, validate=True), content)
            except (InvalidSignature, NotBase64):
                continue
            return True
    return False


class Receiver(BaseHTTPRequestHandler):
    """Takes one message after another. Answers of 2xx end the server's tries, and 410 does too."""

    timeout = 30

    def do_POST(self) -> None:
        """Takes a message of https://www.standardwebhooks.com."""
        length = int(self.headers.get("Content-Length", "0"))
        if not 0 <= length <= MAX_BYTES:
            self.send_error(413)
            return
        body = self.rfile.read(length)
        message_id, sent_at = self.headers.get("webhook-id", ""), self.headers.get("webhook-timestamp", "")
        content = f"{message_id}.{sent_at}.".encode() + body
        if not is_signed(content, self.headers.get("webhook-signature", "")):
            self.send_error(401, "The signature is not the server's")
            return
        if abs(time.time() - int(sent_at)) > MAX_AGE_S:  # every try has a new time
            self.send_error(400, "The message is too old")
            return
        if message_id not in handled:
            handle(json.loads(body))
            handled.add(message_id)
        self.send_response(204)
        self.end_headers()


def handle(message: dict[str, object]) -> None:
    """Prints the job. If this raises an error, the server tries again later."""
    print(message["type"], json.dumps(message["data"], indent=2), flush=True)


if __name__ == "__main__":
    print(f"Listening at http://127.0.0.1:{PORT}/", flush=True)
    HTTPServer(("127.0.0.1", PORT), Receiver).serve_forever()
