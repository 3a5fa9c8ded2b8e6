"""Receives fal's webhooks: checks signature and time, ignores repeats, and prints each result.

Needs: pip install cryptography httpx. Listens at http://127.0.0.1:9000/; fal_submit.sh sends it a request.
"""

import base64
import hashlib
import json
import os
import time
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


def is_signed(content: bytes, signature: str) -> bool:
    """Returns whether a signature, in hexadecimal digits, is the server's."""
    for key in keys:
        try:
            key.verify(bytes.fromhex(signature), content)
        except (InvalidSignature, ValueError):  # ValueError: these are no hexadecimal digits
            continue
        return True
    return False


class Receiver(BaseHTTPRequestHandler):
    """Takes one message after another. Answers of 2xx end the server's tries, and 410 does too."""

    timeout = 30

    def do_POST(self) -> None:
        """Takes a message of https://docs.fal.ai/model-endpoints/webhooks."""
        length = int(self.headers.get("Content-Length", "0"))
        if not 0 <= length <= MAX_BYTES:
            self.send_error(413)
            return
        body = self.rfile.read(length)
        request_id, user_id, sent_at, signature = (
            self.headers.get(f"X-Fal-Webhook-{name}", "")
            for name in ("Request-Id", "User-Id", "Timestamp", "Signature")
        )
        content = "\n".join((request_id, user_id, sent_at, hashlib.sha256(body).hexdigest()))
        if not is_signed(content.encode(), signature):
            self.send_error(401, "The signature is not the server's")
            return
        if abs(time.time() - int(sent_at)) > MAX_AGE_S:  # every try has a new time
            self.send_error(400, "The message is too old")
            return
        if request_id not in handled:
            handle(json.loads(body))
            handled.add(request_id)
        self.send_response(204)
        self.end_headers()


def handle(message: dict[str, object]) -> None:
    """Prints the result. If this raises an error, the server tries again later."""
    print(message["status"], message["request_id"], json.dumps(message["payload"], indent=2), flush=True)


if __name__ == "__main__":
    print(f"Listening at http://127.0.0.1:{PORT}/", flush=True)
    HTTPServer(("127.0.0.1", PORT), Receiver).serve_forever()
