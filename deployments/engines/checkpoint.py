"""Loading of checkpoints: safetensors only, with classes that the server chooses, and no remote code.

The checkpoint of an image model is in diffusers' layout: one folder for each component. A stage loads its own
components. The checkpoint of a classifier or a chat model is in transformers' layout: one folder.
"""

from __future__ import annotations

import io
import logging
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils.logging import set_tqdm_hook

from deployments.checkpoint_files import MODEL_INDEX, declared_classes, folder_of
from deployments.errors import CheckpointError
from deployments.identity import FILE_TYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from deployments.checkpoint_files import Source
    from deployments.config import ModelConfig

logger = logging.getLogger("ray.serve")

WEIGHTS_SHARE = 0.5
"""Assumed share of the loading time that reading weights takes, if compiling follows."""


def load(
    model: ModelConfig,
    components: Mapping[str, Any],
    report: Callable[[float], None],
    *,
    built_in: Mapping[str, Callable[[], Path]],
    device: Callable[[int], str],
    dtype: str,
) -> dict[str, Any]:
    """Loads components of a model's checkpoint. Returns them by name.

    Args:
        model: configuration of the model.
        components: classes of the components, by name.
        report: takes the share that is loaded, 0 to 1.
        built_in: functions that return the folder of a built-in checkpoint, by its name.
        device: returns the device for the weights, given the size of their files in bytes.
        dtype: torch's name of the weights' type.

    Raises:
        CheckpointError: the checkpoint or one of the components is missing or unusable.
    """
    began = time.monotonic()
    patterns = [f"{name}/*.{suffix}" for name in components for suffix in FILE_TYPES]
    folder = _locate(model, built_in, [MODEL_INDEX, *patterns])
    sizes = {
        name: sum(file.stat().st_size for file in (folder / name).glob("*.safetensors"))
        for name in components
    }
    where = device(sum(sizes.values()))
    parts: dict[str, Any] = {}
    for name, cls in components.items():
        _check_component(folder, name, cls)
        with _progress_reported(partial(_report_part, report, sizes, name)):
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
    """Loads a checkpoint in transformers' layout.

    Args:
        source: place of the checkpoint.
        model_class: class of the model.
        reader_class: class that prepares the model's input: a tokenizer or a processor.
        report: takes the share that is loaded, 0 to 1.
        built_in: functions that return the folder of a built-in checkpoint, by its name.
        device: device for the weights.
        dtype: torch's name of the weights' type.

    Returns:
        The model, in evaluation mode, and its tokenizer or processor.

    Raises:
        CheckpointError: the checkpoint is missing or unusable.
    """
    began = time.monotonic()
    folder = _locate(source, built_in, [f"*.{one}" for one in FILE_TYPES])
    # Without this, classes that read their name from the checkpoint would ask on a terminal.
    safe = {"trust_remote_code": False}
    reader = _load_settings(folder, f"{folder}: its {reader_class.__name__}", reader_class, **safe)
    with _progress_reported(report):
        what = f"{folder}: its {model_class.__name__}"
        model = _load_weights(folder, what, model_class, device=device, dtype=dtype, **safe)
    logger.info("loaded %s as %s on %s in %.1f s", folder, dtype, device, time.monotonic() - began)
    return model, reader


def part_of(report: Callable[[float], None], start: float, end: float) -> Callable[[float], None]:
    """Returns a report function for a part of the loading. It maps 0 to 1 to `start` to `end`."""
    return lambda share: report(start + share * (end - start))


def _report_part(report: Callable[[float], None], sizes: Mapping[str, int], name: str, loaded: float) -> None:
    """Reports the share of all components that is loaded.

    Args:
        report: takes the share, 0 to 1.
        sizes: sizes of the components, by name, in the order of loading.
        name: name of the component that is being loaded.
        loaded: share of that component that is loaded, 0 to 1.
    """
    names = list(sizes)
    before = sum(sizes[earlier] for earlier in names[: names.index(name)])
    report((before + loaded * sizes[name]) / max(1, sum(sizes.values())))


@contextmanager
def _progress_reported(report: Callable[[float], None]) -> Iterator[None]:
    """Reports the share of a component that the block has loaded. transformers reports after each tensor.

    diffusers has no hook, so it reports only the end. The libraries' own progress bars would fill the log, so
    they are silenced in the block.
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
    """Returns the checkpoint's folder. Downloads the files of these patterns if it comes from the Hub."""
    if source.checkpoint in built_in:
        return built_in[source.checkpoint]()
    if folder := folder_of(source, built_in):
        return folder
    flat = not any("/" in pattern for pattern in patterns)  # a star in a Hub pattern also matches folders
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
            f"checkpoint {source.checkpoint!r} at revision {source.revision} could not be downloaded: {error}"
        ) from error


def _check_component(folder: Path, name: str, cls: Any) -> None:
    """Checks that a component exists and that the index declares its class.

    For a class of ours, the index declares the library's class that it extends. The server chooses the class
    and only compares the declaration.

    Raises:
        CheckpointError: the component is missing, or declares another class.
    """
    expected = next(base.__name__ for base in cls.__mro__ if not base.__module__.startswith("deployments."))
    try:
        declared = declared_classes(folder)[name]
    except (OSError, ValueError, LookupError) as error:
        raise CheckpointError(
            f"{folder}: model_index.json lists no component {name!r}; download the checkpoint again"
        ) from error
    if declared != expected:
        raise CheckpointError(
            f"{folder}: component {name!r} is a {declared}, not a {expected}; choose another checkpoint"
        )
    if not (folder / name).is_dir():
        raise CheckpointError(f"{folder}: component {name!r} is missing; download the checkpoint again")


def _load_settings(folder: Path, what: str, cls: Any, **options: Any) -> Any:
    """Loads a component without weights.

    Args:
        folder: folder of the component.
        what: name of the component in errors.
        cls: class of the component.
        options: options of `from_pretrained`.

    Raises:
        CheckpointError: the component cannot be loaded.
    """
    try:
        return cls.from_pretrained(folder, **options)
    except Exception as error:  # the libraries raise many kinds of errors
        raise CheckpointError(f"{what} cannot be loaded: {error}") from error


def _load_weights(folder: Path, what: str, cls: Any, *, device: str, dtype: str, **options: Any) -> Any:
    """Loads a component with weights to its device.

    Both libraries map the files into memory. If the type does not change, weights go to the device without a
    copy in the CPU's memory. transformers converts and moves one tensor at a time.

    Args:
        folder: folder of the component.
        what: name of the component in errors.
        cls: class of the component.
        device: device for the weights.
        dtype: torch's name of the weights' type.
        options: more options of `from_pretrained`.

    Raises:
        CheckpointError: the component cannot be loaded, lacks weights, or does not fit on the device.
    """
    options |= {"torch_dtype": getattr(torch, dtype), "use_safetensors": True, "output_loading_info": True}
    if issubclass(cls, PreTrainedModel):
        # Not for diffusers' models: with a device map, missing weights fail without their names.
        options["device_map"] = {"": device}
    try:
        component, report = cls.from_pretrained(folder, **options)
    except Exception as error:
        raise CheckpointError(f"{what} cannot be loaded: {error}") from error
    if missing := sorted(report["missing_keys"]):
        # The libraries fill such gaps with random numbers, and images would be noise.
        raise CheckpointError(f"{what} lacks weights: {', '.join(missing)}; download the checkpoint again")
    try:
        return component.to(torch.device(device))
    except Exception as error:  # no such device, or too little memory on it
        raise CheckpointError(f"{what} cannot be moved to {device}: {error}") from error


class _SilentBar(tqdm):  # type: ignore[misc]
    """A progress bar that draws nothing. It calls `display` whenever it would draw."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False, "leave": False})


class _LoggedProgress(_SilentBar):
    """A progress bar that writes a log line every ten seconds. The library's own bar would fill the log."""

    logged_at = float("-inf")

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Writes a log line if ten seconds have passed. Called for every file and every few bytes.

        There are three bars, and two of them count the same bytes. `msg` is "" when a bar is closed. That may
        be long after the download, when the bar is garbage-collected.
        """
        now = time.monotonic()
        if msg is None and self.unit == "B" and self.n and now - _LoggedProgress.logged_at >= 10:
            _LoggedProgress.logged_at = now
            logger.info("downloading: %.0f of at least %.0f MB", self.n / 1e6, self.total / 1e6)
