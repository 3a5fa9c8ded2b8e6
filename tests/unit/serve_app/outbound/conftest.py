import socket
from ipaddress import ip_address
from typing import Any

import pytest

from tests.unit.serve_app.outbound.server import Names


@pytest.fixture(autouse=True)
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses of other machines that were dialled. No connection is made."""
    dialled: list[str] = []
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if not ip_address(address[0]).is_loopback:
            dialled.append(address[0])
            raise ConnectionRefusedError
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    return dialled


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    names = Names()
    look_up = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, **options: Any) -> list[Any]:
        if host not in names.addresses:  # it is an address, in any spelling
            return list(look_up(host, port, flags=socket.AI_NUMERICHOST, **options))
        names.lookups.append(host)
        addresses = names.addresses[host].pop(0)
        return [look_up(address, port, **options)[0] for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return names
