"""Reading a Serve config file: its own keys, and the configuration of its application."""

from __future__ import annotations

import difflib
import warnings
from typing import TYPE_CHECKING, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from serve_app.config import AppConfig

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic_core import ErrorDetails


class ConfigFileError(ValueError):
    """A config file that cannot be used. Its text has a line a problem.

    Attributes:
        problems: the problems.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(f"  {problem}" for problem in problems))


class ServeApplication(BaseModel):
    """The keys of a Serve application that are supported. Any other key is an error."""

    model_config = ConfigDict(extra="forbid")

    name: str
    route_prefix: str = "/"
    import_path: Literal["serve_app.app:build_app"]
    args: AppConfig


class HTTPOptions(BaseModel):
    """The keys of Serve's `http_options` that are supported. Any other key is an error."""

    model_config = ConfigDict(extra="forbid")

    host: str = "127.0.0.1"
    port: int = 8000
    keep_alive_timeout_s: int = 90
    request_timeout_s: float | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("give both ssl_certfile and ssl_keyfile")
        return self


class ServeFile(BaseModel):
    """A Serve config file with one application."""

    model_config = ConfigDict(extra="forbid")

    http_options: HTTPOptions = HTTPOptions()
    applications: tuple[ServeApplication]

    @property
    def application(self) -> ServeApplication:
        """The file's application."""
        return self.applications[0]


def read(path: Path) -> tuple[ServeFile, list[str]]:
    """Reads a config file.

    Returns:
        its content, and warnings about keys that have a new name.

    Raises:
        ConfigFileError: it cannot be read, or a key or a value is wrong.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FutureWarning)
        try:
            file = ServeFile.model_validate(yaml.safe_load(path.read_text()))
        except ValidationError as error:
            raise ConfigFileError([_problem(one) for one in error.errors()]) from error
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigFileError([_unreadable(error)]) from error
    return file, [str(one.message) for one in caught if one.category is FutureWarning]


def _problem(error: ErrorDetails) -> str:
    """Returns a problem's line: the key, what is wrong, and the key that was probably meant."""
    place = ".".join(map(str, error["loc"])) or "the file"
    if error["type"] != "extra_forbidden":
        return f"{place}: {error['msg']}"
    known = _keys_beside(error["loc"])
    near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(known)}"
    return f"{place}: unknown key; {hint}"


def _unreadable(error: Exception) -> str:
    """Returns why a file cannot be read, without a line of it, which may hold a secret."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error)


def _keys_beside(place: tuple[int | str, ...]) -> list[str]:
    """Returns the known keys of the mapping in which a key is.

    Args:
        place: path of the key, of names and of indexes in lists.
    """
    model: Any = ServeFile
    for part in place[:-1]:
        if isinstance(part, str):
            model = _model_in(model.model_fields[part].annotation)
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Returns the model in a type such as `tuple[Model, ...]` or `Model | None`; None without one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_model_in(one) for one in getattr(annotation, "__args__", ()))
    return next((one for one in inner if one), None)
