"""The addresses on which a server can listen."""

from __future__ import annotations

import socket


def problem(host: str, port: int) -> str | None:
    """Returns why nothing can listen on an address; None if something can.

    Args:
        host: name or address; empty for all interfaces.
        port: the port; 0 for any.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        return f"cannot listen on {host}:{port}: {error}"
    return None
