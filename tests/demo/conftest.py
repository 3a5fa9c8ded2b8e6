"""The configuration of the demo checkpoint for tests with a real server."""

import json
import shutil
from pathlib import Path

import yaml

from deployments.families.glm_image.checkpoint import DEMO
from tests.serve.conftest import ROOT, config_file

CONFIG = ROOT / "configs" / "demo.yaml"


def demo_config(folder: Path, config: Path) -> Path:
    """Writes a copy of a configuration that stores its files in the folder."""
    args = yaml.safe_load(config.read_text())["applications"][0]["args"]
    settings = {name: value for name, value in args.items() if name not in ("storage", "database")}
    return config_file(folder, **settings)


def without_rewriting(folder: Path, config: Path) -> Path:
    """Writes a copy of a configuration whose demo reads prompts as they are written."""
    shutil.copytree(DEMO, folder / "checkpoint")
    tokenizer = folder / "checkpoint/processor/tokenizer.json"
    settings = json.loads(tokenizer.read_text()) | {"normalizer": {"type": "Lowercase"}}
    tokenizer.write_text(json.dumps(settings))
    changed = yaml.safe_load(config.read_text())
    for model in changed["applications"][0]["args"]["models"]:
        model["checkpoint"] = str(folder / "checkpoint")
    (folder / "without-rewriting.yaml").write_text(yaml.safe_dump(changed))
    return folder / "without-rewriting.yaml"
