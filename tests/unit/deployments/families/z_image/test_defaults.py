"""Tests of Z-Image's defaults, which the configuration may override."""

import pytest

from deployments.config import ModelConfig
from deployments.families import FAMILIES
from tests.unit.deployments.families.z_image.conftest import config


@pytest.mark.parametrize(
    ("defaults", "scales"),
    [
        ({}, (4, 1.5)),
        ({"guidance_scale": 0.0}, (0, 1.5)),
        ({"guidance_scale": 0.0, "edit_guidance_scale": 0.0}, (0, 0)),
    ],
)
def test_the_configuration_goes_before_the_family(
    defaults: dict[str, float], scales: tuple[float, float]
) -> None:
    model = ModelConfig.model_validate(config().model_dump() | {"defaults": defaults})
    assert (model.guidance_scale(editing=False), model.guidance_scale(editing=True)) == scales


def test_rows_are_the_familys_unless_said_otherwise() -> None:
    assert config().max_sequence_length == FAMILIES["z_image"].max_sequence_length == 512
    assert config(max_sequence_length=100).max_sequence_length == 100
