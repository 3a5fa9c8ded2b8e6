"""Loading of checkpoints: safetensors only, by classes of our choosing, no remote code.

A model's is in diffusers' layout, a folder for each component, of which a stage loads its own; a classifier's
or a chat model's is in transformers' layout, all in one folder.
"""

from __future__ import annotations

import io
import json
import logging
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from huggingface_hub import snapshot_download
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils.logging import set_tqdm_hook

from deployments.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from deployments.config import ModelConfig

logger = logging.getLogger("ray.serve")

WEIGHTS_SHARE = 0.5
"""Share of the loading that reading weights is taken for, where compiling follows."""
FILE_TYPES = ("json", "jinja", "model", "safetensors", "txt")
"""What is downloaded of a folder: settings, vocabularies and safe weights."""


class Source(Protocol):
    """What of a configuration says where a checkpoint is; see `deployments.config`."""

    @property
    def checkpoint(self) -> str:
        """A folder, a Hub id, or the name of one that is built in."""

    @property
    def revision(self) -> str | None:
        """The Hub's commit."""


def load(
    model: ModelConfig,
    components: Mapping[str, Any],
    report: Callable[[float], None],
    *,
    built_in: Mapping[str, Callable[[], Path]],
    device: Callable[[int], str],
    dtype: str,
) -> dict[str, Any]:
    """Load components of a model's checkpoint.

    Args:
        model: which.
        components: their classes, by name.
        report: told the share that is loaded, 0 to 1.
        built_in: the folders of the family's own checkpoints, by name.
        device: where the weights go, given the size of their files in bytes.
        dtype: theirs, as torch calls it.

    Raises:
        CheckpointError: the checkpoint or one of the components is missing or does not fit.
    """
    began = time.monotonic()
    patterns = [f"{name}/*.{suffix}" for name in components for suffix in FILE_TYPES]
    folder = _locate(model, built_in, ["model_index.json", *patterns])
    sizes = {
        name: sum(file.stat().st_size for file in (folder / name).glob("*.safetensors"))
        for name in components
    }
    where = device(sum(sizes.values()))
    parts: dict[str, Any] = {}
    for name, cls in components.items():
        _check_component(folder, name, cls)
        with _told(partial(_report_part, report, sizes, name)):
            what = f"{folder}: component {name!r}"
            if issubclass(cls, torch.nn.Module):
                parts[name] = _load_weights(folder / name, what, cls, device=where, dtype=dtype)
            else:
                parts[name] = _load_settings(folder / name, what, cls)
    logger.info(
        "%s: loaded %s from %s as %s on %s in %.1f s",
        *(model.name, ", ".join(parts), folder, dtype, where, time.monotonic() - began),
    )
    return parts


def load_flat(
    source: Source,
    model_class: Any,
    reader_class: Any,
    report: Callable[[float], None],
    *,
    built_in: Mapping[str, Callable[[], Path]],
    device: str,
    dtype: str,
) -> tuple[Any, Any]:
    """Load a checkpoint in transformers' layout.

    Args:
        source: where it is.
        model_class: of the model, which is in its evaluation mode then.
        reader_class: of what prepares its input.
        report: told the share that is loaded, 0 to 1.
        built_in: the folders of our own checkpoints, by name.
        device: where weights go.
        dtype: theirs, as torch calls it.

    Raises:
        CheckpointError: the checkpoint is missing or does not fit.
    """
    began = time.monotonic()
    folder = _locate(source, built_in, [f"*.{one}" for one in FILE_TYPES])
    safe = {
        "trust_remote_code": False
    }  # classes that look into the checkpoint for theirs would ask a terminal
    reader = _load_settings(folder, f"{folder}: its {reader_class.__name__}", reader_class, **safe)
    with _told(report):
        what = f"{folder}: its {model_class.__name__}"
        model = _load_weights(folder, what, model_class, device=device, dtype=dtype, **safe)
    logger.info("loaded %s as %s on %s in %.1f s", folder, dtype, device, time.monotonic() - began)
    return model, reader


def part_of(report: Callable[[float], None], start: float, end: float) -> Callable[[float], None]:
    """Returns a report for a part of the loading: its 0 to 1 are `start` to `end` of the whole."""
    return lambda share: report(start + share * (end - start))


def _report_part(report: Callable[[float], None], sizes: Mapping[str, int], name: str, loaded: float) -> None:
    """Report a component of which so much is loaded, after those before it."""
    names = list(sizes)
    before = sum(sizes[earlier] for earlier in names[: names.index(name)])
    report((before + loaded * sizes[name]) / max(1, sum(sizes.values())))


@contextmanager
def _told(report: Callable[[float], None]) -> Iterator[None]:
    """Be told the share of a component that is loaded: by the tensor where transformers loads it.

    diffusers has no hook. The libraries' own bars, which would fill the log, are silent meanwhile.
    """

    class Bar(_SilentBar):
        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            if self.total:
                report(self.n / self.total)

    before = set_tqdm_hook(lambda _, args, kwargs: Bar(*args, **kwargs))
    try:
        yield
    finally:
        set_tqdm_hook(before)
    report(1.0)


def _locate(source: Source, built_in: Mapping[str, Callable[[], Path]], patterns: list[str]) -> Path:
    """The checkpoint's folder, with at least these files downloaded if it comes from the Hub."""
    if source.checkpoint in built_in:
        return built_in[source.checkpoint]()
    folder = Path(source.checkpoint).expanduser()
    if folder.is_dir():
        return folder
    if source.revision is None:
        raise CheckpointError(
            f"checkpoint {source.checkpoint!r} is not a folder on this machine, nor built in "
            f"({', '.join(built_in)}); if it is a Hub id, give `revision` (a commit's 40 digits) too"
        )
    flat = not any("/" in pattern for pattern in patterns)  # to the Hub, a star stands for folders, too
    try:
        return Path(
            snapshot_download(
                source.checkpoint,
                revision=source.revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*"] if flat else None,
                tqdm_class=_LoggedProgress,
            )
        )
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {source.checkpoint!r} at revision {source.revision} could not be had: {error}"
        ) from error


def _check_component(folder: Path, name: str, cls: Any) -> None:
    """Checks that a component exists and that the index declares its class, or the library's that it extends.

    The server chooses the class. The checkpoint's declaration is only compared.
    """
    expected = next(base.__name__ for base in cls.__mro__ if not base.__module__.startswith("deployments."))
    try:
        declared = json.loads((folder / "model_index.json").read_text())[name][1]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{folder}: model_index.json lists no component {name!r}") from error
    if declared != expected:
        raise CheckpointError(f"{folder}: component {name!r} is a {declared}, not a {expected}")
    if not (folder / name).is_dir():
        raise CheckpointError(f"{folder}: component {name!r} is missing")


def _load_settings(folder: Path, what: str, cls: Any, **options: Any) -> Any:
    """Load what has no weights; `what` names it in errors."""
    try:
        return cls.from_pretrained(folder, **options)
    except Exception as error:  # whatever the libraries raise, it is to be named
        raise CheckpointError(f"{what} cannot be loaded: {error}") from error


def _load_weights(folder: Path, what: str, cls: Any, *, device: str, dtype: str, **options: Any) -> Any:
    """Loads what has weights to its device; `what` names it in errors.

    Both libraries map the files into memory. Where the type of the numbers stays, nothing is copied into the
    CPU's memory before it goes to the device. transformers converts and moves each tensor by itself.
    """
    options |= {"torch_dtype": getattr(torch, dtype), "use_safetensors": True, "output_loading_info": True}
    if issubclass(cls, PreTrainedModel):
        # diffusers' models lack this: with a device map it fails on missing weights without naming them.
        options["device_map"] = {"": device}
    try:
        component, report = cls.from_pretrained(folder, **options)
    except Exception as error:
        raise CheckpointError(f"{what} cannot be loaded: {error}") from error
    if missing := sorted(report["missing_keys"]):
        # The libraries fill such gaps with random numbers: something would come, of noise.
        raise CheckpointError(f"{what} lacks weights: {', '.join(missing)}")
    try:
        return component.to(torch.device(device))
    except Exception as error:  # no such device, or too little memory on it
        raise CheckpointError(f"{what} cannot be put on {device}: {error}") from error


class _SilentBar(tqdm):  # type: ignore[misc]
    """A progress bar that paints nothing; `display` is called whenever it would."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False, "leave": False})


class _LoggedProgress(_SilentBar):
    """A progress bar for a log: a line every ten seconds, where the library's bars are painted often."""

    logged_at = float("-inf")

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Called with every file and every few bytes, for three bars, two of which count the same bytes.

        When a bar is closed `msg` is empty; that may be when it is collected, long after.
        """
        now = time.monotonic()
        if msg is None and self.unit == "B" and self.n and now - _LoggedProgress.logged_at >= 10:
            _LoggedProgress.logged_at = now
            logger.info("downloading: %.0f of at least %.0f MB", self.n / 1e6, self.total / 1e6)
