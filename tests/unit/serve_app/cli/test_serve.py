"""The command `serve`: its lines while a start takes long."""

import threading
from types import SimpleNamespace

import pytest
from ray import serve

from serve_app.cli.serve import _show_waiting

MESSAGES = {
    "m-prior": "Deployment 'm-prior' in application 'm' has 1 replicas that have taken more than 30s to "
    "initialize.\nThis may be caused by a slow __init__ or reconfigure method.",
    "m-decoder": "Resources required for each replica: {'GPU': 1}",
    "Ingress": "",
}


def test_a_start_that_takes_long_says_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    is_ready = threading.Event()
    looks = 0

    def status() -> SimpleNamespace:
        nonlocal looks
        looks += 1
        if looks == 3:
            is_ready.set()
        deployments = {name: SimpleNamespace(message=message) for name, message in MESSAGES.items()}
        return SimpleNamespace(applications={"m": SimpleNamespace(deployments=deployments)})

    monkeypatch.setattr(serve, "status", status)
    monkeypatch.setattr("serve_app.cli.serve.PATIENCE_S", 0)
    _show_waiting("m", is_ready)
    assert capsys.readouterr().out.splitlines() == [
        "Still starting.",
        "m-prior is loading.",
        "m-decoder: Resources required for each replica: {'GPU': 1}",
    ]
