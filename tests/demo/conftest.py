"""The configuration of the demo checkpoint for tests with a real server."""

from pathlib import Path

import yaml

from tests.serve.conftest import ROOT, config_file

CONFIG = ROOT / "configs" / "demo.yaml"


def demo_config(folder: Path, config: Path) -> Path:
    """Writes a copy of a configuration that stores its files in the folder."""
    args = yaml.safe_load(config.read_text())["applications"][0]["args"]
    settings = {name: value for name, value in args.items() if name not in ("storage", "database")}
    return config_file(folder, **settings)
