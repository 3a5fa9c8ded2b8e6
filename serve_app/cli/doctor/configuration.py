"""Findings about a configuration's address, certificate, keys and environment variables."""

from __future__ import annotations

import os
import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509

from serve_app.cli import ports
from serve_app.cli.doctor.findings import fault, fine, program, reason
from serve_app.cli.serve import is_local
from serve_app.http.auth import keys_in

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serve_app.cli.config_file import HTTPOptions
    from serve_app.cli.doctor.findings import Finding
    from serve_app.config import APIKey, AppConfig


def address(http: HTTPOptions) -> Iterator[Finding]:
    """Yields whether a server can listen on the configured address."""
    if problem := ports.problem(http.host, http.port):
        yield fault(
            problem, "stop the program that listens there, unless it is this server, or choose another --port"
        )
    else:
        yield fine(f"address {http.host}:{http.port} is free")


def certificate(http: HTTPOptions) -> Iterator[Finding]:
    """Yields whether the certificate can be used."""
    if http.ssl_certfile is None or http.ssl_keyfile is None:
        return
    try:
        chain = x509.load_pem_x509_certificates(Path(http.ssl_certfile).read_bytes())
        Path(http.ssl_keyfile).read_bytes()  # the next line's error would not name the file
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(http.ssl_certfile, http.ssl_keyfile, password="")  # do not ask on a terminal
    except (OSError, ValueError) as error:
        yield fault(
            f"certificate {http.ssl_certfile}: {reason(error)}",
            "correct http_options.ssl_certfile and ssl_keyfile",
        )
        return
    begin = max(one.not_valid_before_utc for one in chain)
    end = min(one.not_valid_after_utc for one in chain)
    text = f"certificate {http.ssl_certfile} is valid from {begin:%Y-%m-%d} to {end:%Y-%m-%d}"
    if begin <= datetime.now(UTC) < end:
        yield fine(text)
    else:
        yield fault(f"{text}, not now", "renew the certificate, or correct this machine's clock")


def keys(config: AppConfig, host: str) -> Iterator[Finding]:
    """Yields whether there are keys where they are needed, and whether their variables are set.

    Args:
        config: the configuration.
        host: address to listen on.
    """
    auth = config.auth
    found: tuple[APIKey, ...] = ()
    if auth.keys_file:
        try:
            found = keys_in(auth.keys_file)
        except (OSError, ValueError) as error:
            text = str(error) if isinstance(error, OSError) or auth.keys_file in str(error) else reason(error)
            yield fault(f"auth.keys_file: {text}", f"correct the file; {_new_key()} prints lines for it")
        else:
            yield fine(f"auth.keys_file {auth.keys_file} has {len(found)} keys")
    listed = [*auth.api_keys, *found]
    variables = {f"API key {key.id}": key.secret_env for key in listed if key.secret_env}
    if config.prompt_expander and (endpoint := config.prompt_expander.endpoint) and endpoint.key_env:
        variables["prompt_expander.endpoint"] = endpoint.key_env
    for name, variable in variables.items():
        if os.environ.get(variable):
            yield fine(f"{name}: the environment variable {variable} is set")
        else:
            yield fault(
                f"{name}: the environment variable {variable} is not set", f"export {variable}='THE KEY'"
            )
    if len({key.id for key in listed}) < len(listed):
        yield fault("API keys: two of them have the same id", "give each an id of its own")
    if auth.open and not auth.has_keys and not is_local(host):
        yield fault(f"other machines reach {host}, and there are no API keys", f"{_new_key()}, and list it")


def _new_key() -> str:
    return f"`{program('python')} -m serve_app keys new NAME`"
