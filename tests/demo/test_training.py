"""Tests of the demo checkpoint's training: scenes, codes, requests, and the loop."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from diffusers import GlmImagePipeline
from safetensors.torch import load_file
from torch.nn.utils import parametrize

from deployments.families.glm_image.versions import image_tokens
from training.demo import codebook, decoder, model, prior, reading, samples, trainer, vae
from training.demo.codebook import Codes, SumsOfParts
from training.demo.scenes import CELL, COLOURS, Frame, Scene, Thing, draw, random_scene
from training.demo.trainer import TrainingRun


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codebook, "BATCHES", 6)
        run = TrainingRun(tmp_path_factory.mktemp("demo"), torch.device("cpu"), minutes=0.02, workers=0)
        codebook.train(run)
    return run


@pytest.fixture(scope="module")
def codes(run: TrainingRun) -> Codes:
    return Codes(run)


@pytest.fixture(scope="module")
def processor() -> Any:
    return model.processor()


@pytest.fixture(scope="module")
def net(processor: Any, codes: Codes) -> Any:
    net = model.prior(processor)
    codebook.install(net, codes)
    return net


def some_scenes(count: int) -> list[Scene]:
    rng = random.Random("tests of the training")
    return [random_scene(rng) for _ in range(count)]


def test_a_crop_is_cut_from_the_picture() -> None:
    scenes = some_scenes(8)
    whole = draw(scenes, Frame(512, 768))
    corners = tuple((32 * number, 64 * number) for number in range(8))
    crops = draw(scenes, Frame(512, 768, crop=256, corners=corners))
    for picture, crop, (top, left) in zip(whole, crops, corners, strict=True):
        assert torch.allclose(picture[:, top : top + 256, left : left + 256], crop, atol=1e-4)


def test_cells_of_one_colour_have_the_first_codes(codes: Codes) -> None:
    for number, colour in enumerate(COLOURS):
        scene = Scene(colour, some_scenes(1)[0].things[:0], "")
        assert set(codes.encode_pictures(draw([scene], Frame(512, 512))).flatten().tolist()) == {number}


def test_a_scene_has_the_codes_that_its_picture_has_or_ones_that_look_alike(codes: Codes) -> None:
    scenes = some_scenes(20)
    drawn, seen = (
        codes.encode_scenes(scenes, Frame(512, 512)),
        codes.encode_pictures(draw(scenes, Frame(512, 512))),
    )
    busy = drawn >= model.PLAIN
    assert (drawn == seen)[~busy].float().mean() > 0.98
    assert (drawn == seen)[busy].float().mean() > 0.5  # an edge has two codes, one of them inside out
    likeness = (codes.vectors[drawn] * codes.vectors[seen]).sum(-1)
    assert likeness.min() > 0.8


def test_the_model_reads_pictures_as_the_training_does(codes: Codes, net: Any, processor: Any) -> None:
    picture = draw(some_scenes(1), Frame(512, 512))
    pixels = ((picture[0] + 1) * 127.5).round().byte()
    read = processor.image_processor(pixels, return_tensors="pt")
    with torch.inference_mode():
        ids = image_tokens(net, read["pixel_values"], read["image_grid_thw"])
    assert torch.equal(ids.view(16, 16), codes.encode_pictures(picture)[0])


def test_a_scene_is_found_where_a_blurred_picture_of_it_has_its_objects() -> None:
    things = (Thing("star", "red", "small", 0.25, 0.5), Thing("circle", "blue", "small", 0.75, 0.5))
    scene = Scene("white", things, "")
    cell = CELL / reading.SIDE
    moved = replace(scene, things=(replace(things[0], x=0.25 + cell), replace(things[1], y=0.5 - cell)))
    picture = functional.avg_pool2d(draw([moved], Frame(512, 512)), 9, 1, 4, count_include_pad=False)
    assert reading.locate_objects(scene, picture[0]) == moved


def test_the_reader_begins_as_the_tokenizer_is(codes: Codes, net: Any) -> None:
    codebook.install(net, codes)
    pictures = draw(some_scenes(8), Frame(512, 768))
    with torch.inference_mode():
        cells = codebook.extract_cells(pictures)
        near = torch.rand(cells.shape[:3]) < 0.5
        logits = reading.Reader(net.model.visual, codes)(cells, near) / reading.SHARPNESS
        assert torch.allclose(
            logits, codes.similarities(cells)[near], atol=2e-3
        )  # the codebook is in half precision


def test_a_painted_picture_in_other_colours_is_the_other_scene() -> None:
    rng = random.Random(0)
    frame = Frame(512, 512)
    for before in some_scenes(20):
        after = reading.recolour_scene(before, rng)
        drawn, redrawn = (codebook.extract_cells(draw([scene], frame))[0] for scene in (before, after))
        assert (
            reading.recolour_cells(drawn, before, after) - redrawn
        ).abs().mean() < 0.01  # values span about 4


def test_a_table_is_the_sum_of_its_parts() -> None:
    parts = torch.randn(3 * model.PLAIN + model.GEOMETRIES + 2, 5)
    sums = SumsOfParts()
    table = sums(parts)
    assert table.shape == (model.CODEBOOK + 2, 5)
    assert torch.allclose(sums(sums.right_inverse(table)), table, atol=1e-4)


@pytest.mark.parametrize("editing", [False, True])
@pytest.mark.parametrize("size", [(512, 512), (512, 768), (1024, 768)])
def test_requests_are_those_that_the_processor_makes(
    editing: bool, size: tuple[int, int], net: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prior, "EDITS", float(editing))
    monkeypatch.setattr(prior, "PREVIEWS", 0.0)
    monkeypatch.setattr(prior, "pick_size", lambda _: size)
    batch = prior.make_batch(processor.tokenizer, 4000, random.Random(0))
    height, width = size
    for line, scene in enumerate(batch.scenes):
        content: list[dict[str, Any]] = [{"type": "text", "text": scene.sentence}]
        if editing:
            content.insert(0, {"type": "image", "image": torch.zeros(3, height, width, dtype=torch.uint8)})
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"target_h": height, "target_w": width},
        )
        (ids,) = inputs["input_ids"]
        assert batch.prompts[line][-len(ids) :].tolist() == ids.tolist()
        assert (batch.valid[line][: batch.prompts.shape[1]].sum()) == len(ids)
        positions, _ = net.model.get_rope_index(
            inputs["input_ids"],
            image_grid_thw=inputs["image_grid_thw"],
            images_per_sample=inputs.get("images_per_sample"),
        )
        begins = batch.prompts.shape[1] - len(ids)
        assert torch.equal(batch.positions[:, line, begins : batch.prompts.shape[1]], positions[:, 0])


def weights_of_the_prior(run: TrainingRun) -> dict[str, torch.Tensor]:
    return load_file(run.checkpoint / "vision_language_encoder" / "model.safetensors")


@pytest.mark.slow
def test_training_resumes_and_ends_with_a_checkpoint(
    run: TrainingRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prior, "TOKENS", {"cpu": 700})
    monkeypatch.setattr(decoder, "BATCH", {"cpu": 1})
    monkeypatch.setattr(vae, "BATCH", {"cpu": 1})
    monkeypatch.setattr(vae, "MEASURED", 1)
    monkeypatch.setattr(trainer, "LOG_INTERVAL_S", 0)
    monkeypatch.setattr(samples, "COLUMNS", 1)
    monkeypatch.setattr(reading, "PAINTED", 1)
    model.write_processor(run)
    for part in (vae, prior, decoder):
        part.train(run)
    learnt = weights_of_the_prior(run)
    reading.train(run)
    printed = capsys.readouterr().out
    assert all(f"{part}: step 1, " in printed for part in ("vae", "prior", "decoder", "reading"))
    changed = {name for name, weight in weights_of_the_prior(run).items() if not weight.equal(learnt[name])}
    embeddings = {f"model.visual.patch_embed.proj.{name}" for name in ("weight", "bias")}
    assert changed > embeddings | {"model.vqmodel.quantize.embedding.weight"}
    assert all(name.startswith(("model.visual.", "model.vqmodel.quantize.")) for name in changed)
    longer = TrainingRun(run.folder, run.device, minutes=2 * run.minutes, workers=0)
    prior.train(longer)
    assert "prior: resumes at step" in capsys.readouterr().out
    samples.paint(longer)
    assert (run.folder / "samples.png").exists()
    pipeline = GlmImagePipeline.from_pretrained(run.checkpoint)
    table = pipeline.transformer.prior_token_embedding
    assert not parametrize.is_parametrized(table)
    assert table.weight.shape[0] == model.CODEBOOK
