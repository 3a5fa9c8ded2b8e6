"""Config files for tests: those of the repository with other values."""

import json
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[4]
ARGS = "applications.0.args"


def changed(folder: Path, changes: dict[str, Any], name: str = "tiny") -> Path:
    """Writes a configuration of the repository with other values. Returns the file.

    Args:
        folder: where to write it.
        changes: the values, by dotted path.
        name: name of the configuration.
    """
    content = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    content = json.loads(json.dumps(content))  # both stages are one object in the file
    for place, value in changes.items():
        target: Any = content
        *path, last = place.split(".")
        for part in path:
            target = target[int(part)] if part.isdigit() else target.setdefault(part, {})
        target[last] = value
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    return file
