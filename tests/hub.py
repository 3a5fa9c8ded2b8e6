"""Checkpoints as downloads leave them: in the Hub's cache, in a folder, and in several files."""

import hashlib
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

REPOSITORY = "org/model"
COMMIT = "c" * 40
TRANSFORMER = "transformer/diffusion_pytorch_model"


def cached(checkpoint: Path, cache: Path) -> Path:
    """Puts a checkpoint into a Hub cache, as `REPOSITORY` at `COMMIT`. Returns its folder there.

    Weights are blobs that are named by their SHA-256. Other blobs have names of another kind.
    """
    root = cache / f"models--{REPOSITORY.replace('/', '--')}"
    for file in [path for path in checkpoint.rglob("*") if path.is_file()]:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        blob = root / "blobs" / (digest if file.suffix == ".safetensors" else digest[:40])
        link = root / "snapshots" / COMMIT / file.relative_to(checkpoint)
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(blob)
    return root / "snapshots" / COMMIT


def record_download(folder: Path) -> None:
    """Adds the records that `hf download --local-dir` keeps of its files."""
    for file in sorted(folder.rglob("*.safetensors")):
        record = folder / ".cache/huggingface/download" / f"{file.relative_to(folder)}.metadata"
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(f"{COMMIT}\n{hashlib.sha256(file.read_bytes()).hexdigest()}\n1795000000.0\n")


def split_transformer(folder: Path) -> list[Path]:
    """Splits a checkpoint's transformer into three files with an index. Returns the files."""
    whole = folder / f"{TRANSFORMER}.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    whole.unlink()
    shards: list[Path] = []
    weight_map: dict[str, str] = {}
    for number in range(3):
        part = {name: tensors[name] for name in names[number::3]}
        shards.append(folder / f"{TRANSFORMER}-{number + 1:05}-of-00003.safetensors")
        save_file(part, shards[-1])
        weight_map |= dict.fromkeys(part, shards[-1].name)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / f"{TRANSFORMER}.safetensors.index.json").write_text(json.dumps(index))
    return shards
