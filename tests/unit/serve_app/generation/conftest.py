from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.config import ModelConfig
from deployments.types import Event as StageEvent
from deployments.types import ImageRequest, Pixels, Preview, Progress
from serve_app.config import Limits, OutboundConfig, StorageConfig
from serve_app.files.store import FileStore
from serve_app.generation.generator import Generator
from serve_app.generation.sources import SourceReader
from serve_app.generation.unit import Model, StageCall
from serve_app.outbound import Outbound
from tests.unit.serve_app.generation.making import PREVIEW, prior


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(StorageConfig(url=str(tmp_path / "files"), min_free_bytes=0))


@pytest.fixture
def sources(files: FileStore) -> SourceReader:
    """A reader of source images that reaches no other server."""
    return SourceReader(Outbound(OutboundConfig()), files, Limits())


@pytest.fixture
def decoded() -> list[ImageRequest]:
    """The requests that the decoder got."""
    return []


@pytest.fixture
def make(
    model_config: Callable[..., ModelConfig], decoded: list[ImageRequest], sources: SourceReader
) -> Callable[..., Generator]:
    async def decode(request: ImageRequest) -> AsyncGenerator[StageEvent | Pixels, None]:
        decoded.append(request)
        yield Progress(done=1, total=request.steps, seconds=0.1)
        if request.previews:
            yield Preview(index=0, pixels=PREVIEW)
        yield np.zeros((request.height, request.width, 3), dtype=np.uint8)

    def generator(
        prior: StageCall = prior,
        decode: StageCall = decode,
        names: tuple[str, ...] = ("m",),
        on_change: Callable[[], None] = lambda: None,
        share: Callable[[tuple[Pixels, ...]], Any] = lambda pixels: pixels,
        **limits: Any,
    ) -> Generator:
        configs = [model_config().model_copy(update={"name": name}) for name in names]
        models = {one.name: Model(config=one, prior=prior, decode=decode) for one in configs}
        return Generator(models, Limits(**limits), sources, on_change, share=share)

    return generator
