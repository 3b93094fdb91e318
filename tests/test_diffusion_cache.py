"""Encoded pairs: the same with and without a disk, found again by content, never half there."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image, ImageOps
from pydantic import ValidationError

from diffusion import arrays, cache, transforms
from diffusion.cache import PairData, prepare
from diffusion.models import DiffusionModel, load_model
from diffusion.settings import LatentSettings, ModelSettings
from diffusion.transforms import View
from mmalign.errors import UserError
from mmalign.media import Media
from mmalign.records import Preference, Side


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DiffusionModel]:
    root = tmp_path_factory.mktemp("pipelines")
    tiny_models.write(tiny_models.sd_pipeline(), root / "sd")
    tiny_models.write(tiny_models.sdxl_pipeline(), root / "sdxl")
    return {name: load_model(ModelSettings(path=str(root / name))) for name in ("sd", "sdxl")}


@pytest.fixture
def sd(models: dict[str, DiffusionModel]) -> DiffusionModel:
    return models["sd"]


def picture(seed: int, width: int = 40, height: int = 32) -> Media:
    """A smooth random picture, so that resizing and crops matter."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return Media.from_image(image, place=f"picture {seed}")


def pair(index: int, prompt: str = "a red circle", label: Any = "a", **fields: Any) -> Preference:
    sides = [Side(prompt=prompt, response=fields.pop(name, picture(2 * index + k))) for k, name in enumerate("ab")]
    return Preference(item_id=f"pair-{index}", a=sides[0], b=sides[1], label=label, **fields)


def some_pairs(count: int = 5) -> list[Preference]:
    prompts = ["a red circle", "two blue squares"]
    return [pair(i, prompts[i % 2], "ab"[i % 2], confidence=0.9, gap=0.5 + i) for i in range(count)]


def memory(**settings: Any) -> LatentSettings:
    return LatentSettings(cache=None, **settings)


def assert_same_batches(a: PairData, b: PairData, visits: int = 2) -> None:
    assert a.key == b.key and a.buckets == b.buckets and len(a) == len(b) and a.elements == b.elements
    for items in a.buckets.values():
        for visit in range(visits):
            mine, other = (data.batch(items, [visit] * len(items), seed=3) for data in (a, b))
            for field in dataclasses.fields(mine):
                x, y = getattr(mine, field.name), getattr(other, field.name)
                if field.name == "conditioning":
                    assert torch.equal(x.embeds, y.embeds)
                    assert x.pooled is None or torch.equal(x.pooled, y.pooled)
                    assert x.time_ids is None or torch.equal(x.time_ids, y.time_ids)
                else:
                    assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


# ----------------------------------------------------------------------------------------------------
# Transforms


def test_a_picture_of_the_right_size_is_left_alone() -> None:
    image = picture(1, 32, 32).open()
    fitted, crop = transforms.fit(image, (32, 32), View())
    assert crop == (0, 0) and fitted.tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("width", "height", "view", "crop"),
    [
        (64, 32, View(), (0, 16)),
        (64, 32, View(x=0.0), (0, 0)),
        (64, 32, View(x=1.0, y=1.0), (0, 32)),
        (32, 64, View(y=0.25), (8, 0)),
        (16, 20, View(), (4, 0)),  # enlarged
        (31, 32, View(), (0, 0)),
        (3000, 40, View(), (0, 1184)),
    ],
)
def test_pictures_are_covered_and_cropped(width: int, height: int, view: View, crop: tuple[int, int]) -> None:
    fitted, where = transforms.fit(picture(1, width, height).open(), (32, 32), view)
    assert fitted.size == (32, 32) and where == crop


def test_mirroring_comes_before_the_crop() -> None:
    image = picture(1, 64, 32).open()
    mirrored, crop = transforms.fit(image, (32, 32), View(x=0.0, mirrored=True))
    assert crop == (0, 0)
    assert mirrored.tobytes() == ImageOps.mirror(image.crop((32, 0, 64, 32))).tobytes()


def test_pixels_span_minus_one_to_one() -> None:
    image = Image.fromarray(np.array([[[0, 255, 51]]], np.uint8))
    torch.testing.assert_close(transforms.to_pixels([image]).flatten(), torch.tensor([-1.0, 1.0, -0.6]))


def test_automatic_buckets() -> None:
    for resolution, multiple, step in ((512, 64, 64), (1024, 32, 64), (32, 8, 8)):
        sizes = transforms.bucket_sizes(LatentSettings(buckets="auto"), resolution, multiple)
        assert (resolution, resolution) in sizes and len(sizes) == len(set(sizes)) > 3
        for width, height in sizes:
            assert width % step == 0 == height % step and 0.9 * resolution**2 < width * height <= resolution**2
            assert (height, width) in sizes and max(width, height) <= 2 * resolution
    assert (1152, 896) in transforms.bucket_sizes(LatentSettings(buckets="auto"), 1024, 32)
    assert transforms.bucket_sizes(LatentSettings(), 64, 8) == [(64, 64)]


def test_buckets_are_chosen_by_both_sides_aspect() -> None:
    buckets = [(32, 32), (48, 16), (16, 48)]
    assert transforms.nearest_bucket([(100, 100), (101, 100)], buckets) == (32, 32)
    assert transforms.nearest_bucket([(300, 100), (310, 100)], buckets) == (48, 16)
    assert transforms.nearest_bucket([(300, 100), (100, 300)], buckets) == (32, 32)
    assert transforms.nearest_bucket([(10, 30), (10, 31)], buckets) == (16, 48)


def test_size_comes_from_the_header_as_displayed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert transforms.size_of(picture(1, 40, 32)) == (40, 32)
    exif = Image.Exif()
    exif[274] = 6
    buffer = io.BytesIO()
    picture(1, 40, 32).open().save(buffer, format="JPEG", exif=exif)
    turned = Media(data=buffer.getvalue())
    assert transforms.size_of(turned) == turned.open().size == (32, 40)
    with pytest.raises(UserError, match="cannot decode"):
        transforms.size_of(Media(data=b"not a picture", place="row 3"))


def test_views_are_drawn_once_and_shared() -> None:
    settings = memory(views=4, crop="random", flip=True, seed=5)
    views = transforms.views_of(settings, "x")
    assert views == transforms.views_of(settings, "x") and len(set(views)) == 4
    assert views[0] == View() and views[1:] != transforms.views_of(settings, "y")[1:]
    assert views[1:] != transforms.views_of(memory(views=4, crop="random", flip=True, seed=6), "x")[1:]
    assert transforms.views_of(memory(views=2, flip=True), "x") == [View(), View(mirrored=True)]
    many = [v for i in range(60) for v in transforms.views_of(settings, str(i))[1:]]
    assert 0.3 < np.mean([v.mirrored for v in many]) < 0.7
    assert not any(v.mirrored for v in transforms.views_of(memory(views=9, crop="random"), "x"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flip": True}, "need views of 2 or more"),
        ({"crop": "random"}, "need views of 2 or more"),
        ({"views": 2}, "would all be the same"),
        ({"views": 3, "flip": True}, "two different views"),
    ],
)
def test_views_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LatentSettings(**settings)


# ----------------------------------------------------------------------------------------------------
# What is in a batch


def test_latents_are_those_of_the_model(sd: DiffusionModel) -> None:
    pairs = some_pairs()
    data = prepare(sd, pairs, memory())
    assert len(data) == 5 and data.buckets == {(32, 32): [0, 1, 2, 3, 4]} and data.elements == 4 * 8 * 8
    batch = data.batch([3, 0], [0, 7], seed=1)
    chosen = [pairs[3].b, pairs[0].a]
    rejected = [pairs[3].a, pairs[0].b]
    for row, side in enumerate([*chosen, *rejected]):
        assert isinstance(side.response, Media)
        pixels = transforms.to_pixels([transforms.fit(side.response.open(), (32, 32), View())[0]])
        torch.testing.assert_close(batch.latents[row], sd.encode_images(pixels)[0][0], rtol=1e-4, atol=1e-5)
    prompts = [side.prompt for side in [*chosen, *rejected]]
    torch.testing.assert_close(batch.conditioning.embeds, sd.encode_prompts(prompts).embeds, rtol=1e-4, atol=1e-5)
    assert batch.keys == ("pair-3:0", "pair-0:7") and batch.seed == 1
    assert batch.confidence is not None and batch.confidence.tolist() == pytest.approx([0.9, 0.9])
    assert batch.gap is not None and batch.gap.tolist() == [3.5, 0.5]


def test_labels_that_are_not_there(sd: DiffusionModel) -> None:
    data = prepare(sd, [pair(0), pair(1, gap=0.5), pair(2, label="tie", confidence=0.5)], memory())
    batch = data.batch([0, 1, 2], [0, 0, 0], seed=0)
    assert batch.gap is None and batch.confidence is not None
    assert batch.confidence.tolist() == [1.0, 1.0, 0.5]


def test_sides_may_have_different_prompts(sd: DiffusionModel) -> None:
    one = Preference(
        item_id="x",
        a=Side(prompt="a circle", response=picture(1)),
        b=Side(prompt="a square", response=picture(1)),
        label="b",
    )
    data = prepare(sd, [one], memory())
    batch = data.batch([0], [0], seed=0)
    expected = sd.encode_prompts(["a square", "a circle"]).embeds
    torch.testing.assert_close(batch.conditioning.embeds, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(batch.latents[0], batch.latents[1])


def test_time_ids_of_sdxl(models: dict[str, DiffusionModel]) -> None:
    one = pair(0, a=picture(1, 80, 64), b=picture(2, 30, 60))
    batch = prepare(models["sdxl"], [one], memory()).batch([0], [0], seed=0)
    ids = batch.conditioning.time_ids
    assert ids is not None and batch.conditioning.pooled is not None
    assert ids.tolist() == [[64, 80, 0, 4, 32, 32], [60, 30, 16, 0, 32, 32]]
    text = models["sdxl"].encode_prompts(["a red circle"])
    assert text.pooled is not None
    torch.testing.assert_close(batch.conditioning.pooled[:1], text.pooled, rtol=1e-4, atol=1e-5)
    constant = DiffusionModel(
        models["sdxl"].pipeline, models["sdxl"].settings.model_copy(update={"time_ids": "constant"})
    )
    ids = prepare(constant, [one], memory(buckets=((40, 24),))).batch([0], [0], seed=0).conditioning.time_ids
    assert ids is not None and ids.tolist() == [[24, 40, 0, 0, 24, 40]] * 2


def test_buckets_group_pairs(sd: DiffusionModel) -> None:
    wide = pair(1, a=picture(3, 90, 40), b=picture(4, 60, 30))
    data = prepare(sd, [pair(0, a=picture(1, 33, 32)), wide, pair(2)], memory(buckets="auto"))
    assert sorted(i for items in data.buckets.values() for i in items) == [0, 1, 2]
    (size,) = [size for size, items in data.buckets.items() if 1 in items]
    assert size[0] > size[1] and 0 not in data.buckets[size]
    batch = data.batch([1], [0], seed=0)
    assert batch.latents.shape == (2, *sd.latent_shape(*size))
    with pytest.raises(ValueError, match="one bucket"):
        data.batch([0, 1], [0, 0], seed=0)
    with pytest.raises(UserError, match=r"33 x 32 has a side that is not a multiple of 8.*data\.buckets"):
        prepare(sd, [pair(0)], memory(buckets=((33, 32),)))


def test_views_follow_visits_and_are_shared_by_both_sides(sd: DiffusionModel) -> None:
    same = pair(0, a=picture(1, 60, 32), b=picture(1, 60, 32))
    data = prepare(sd, [same], memory(views=3, crop="random", flip=True))
    seen = [data.batch([0], [visit], seed=0).latents for visit in range(4)]
    assert all(torch.equal(*latents.chunk(2)) for latents in seen)  # one picture, one view, both sides
    assert torch.equal(seen[3], seen[0])
    assert not torch.equal(seen[1], seen[0]) and not torch.equal(seen[1], seen[2])
    plain = prepare(sd, [same], memory()).batch([0], [0], seed=0).latents
    torch.testing.assert_close(seen[0], plain, rtol=1e-4, atol=1e-5)


def test_prompt_dropout_empties_both_sides(models: dict[str, DiffusionModel]) -> None:
    model = models["sdxl"]
    data = prepare(model, some_pairs(6), memory(prompt_dropout=0.5))
    items = list(range(6)) * 20
    visits = [i // 6 for i in range(120)]
    rows = data.batch(items, visits, seed=0).conditioning
    empty = ~rows.embeds.flatten(1).any(dim=1)
    assert rows.pooled is not None and torch.equal(empty, ~rows.pooled.any(dim=1))
    assert torch.equal(*empty.chunk(2)) and 0.35 < empty.float().mean() < 0.65
    assert rows.time_ids is not None and rows.time_ids[empty].any()
    again = data.batch(items[5:6], visits[5:6], seed=0).conditioning
    assert torch.equal(again.embeds[0], rows.embeds[5])  # whatever it is batched with
    other = data.batch(items, visits, seed=1).conditioning
    assert not torch.equal(other.embeds, rows.embeds)


def test_posterior_samples_are_seeded_per_pair_visit_and_side(sd: DiffusionModel) -> None:
    data = prepare(sd, some_pairs(3), memory(posterior="sample"))
    mean = prepare(sd, some_pairs(3), memory()).batch([0, 1], [0, 0], seed=0).latents
    batch = data.batch([0, 1], [0, 0], seed=0).latents
    assert batch.shape == mean.shape and not torch.allclose(batch, mean, atol=1e-3)
    assert torch.equal(data.batch([1], [0], seed=0).latents, batch[[1, 3]])
    for other in (data.batch([0, 1], [1, 0], seed=0), data.batch([0, 1], [0, 0], seed=5)):
        assert not torch.equal(other.latents[0], batch[0])
    draws = torch.cat([data.batch([0], [visit], seed=0).latents for visit in range(300)])
    media = [side.response for side in data_sides(some_pairs(1)[0])]
    for row, response in enumerate(media):
        pixels = transforms.to_pixels([transforms.fit(response.open(), (32, 32), View())[0]])
        expected, deviation = sd.encode_images(pixels)
        drawn = (draws[row::2] - expected) / deviation
        assert abs(drawn.mean().item()) < 0.02 and drawn.std().item() == pytest.approx(1, abs=0.02)


def data_sides(preference: Preference) -> tuple[Any, Any]:
    return preference.chosen, preference.rejected


def test_half_precision_on_disk(sd: DiffusionModel, tmp_path: Path) -> None:
    full = prepare(sd, some_pairs(), memory()).batch([0], [0], seed=0)
    half = prepare(sd, some_pairs(), LatentSettings(cache=tmp_path, dtype="fp16")).batch([0], [0], seed=0)
    assert half.latents.dtype == torch.float32
    assert torch.equal(half.latents, full.latents.half().float())
    assert torch.equal(half.conditioning.embeds, full.conditioning.embeds.half().float())


# ----------------------------------------------------------------------------------------------------
# The cache


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_cache_on_equals_cache_off(models: dict[str, DiffusionModel], tmp_path: Path, family: str) -> None:
    options: dict[str, Any] = {
        "views": 2,
        "flip": True,
        "prompt_dropout": 0.3,
        "posterior": "sample",
        "buckets": "auto",
    }
    pairs = [*some_pairs(), pair(9, a=picture(30, 90, 40), b=picture(31, 90, 40))]
    off = prepare(models[family], pairs, memory(**options))
    made = prepare(models[family], pairs, LatentSettings(cache=tmp_path, **options))
    found = prepare(models[family], pairs, LatentSettings(cache=tmp_path, **options))
    assert_same_batches(off, made)
    assert_same_batches(off, found)


@pytest.fixture
def count_encodings(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    seen = [0]
    encode = DiffusionModel.encode_images

    def counted(self: DiffusionModel, pixels: torch.Tensor) -> Any:
        seen[0] += len(pixels)
        return encode(self, pixels)

    monkeypatch.setattr(DiffusionModel, "encode_images", counted)

    def since() -> int:
        count, seen[0] = seen[0], 0
        return count

    return since


def test_pictures_are_encoded_once(sd: DiffusionModel, count_encodings: Callable[[], int], tmp_path: Path) -> None:
    shared = [pair(i, a=picture(0), b=picture(i + 1)) for i in range(4)]
    prepare(sd, shared, LatentSettings(cache=tmp_path))
    assert count_encodings() == 5
    prepare(sd, shared, LatentSettings(cache=tmp_path))
    assert count_encodings() == 0


def test_encodings_do_not_depend_on_labels_but_the_key_does(
    sd: DiffusionModel, count_encodings: Callable[[], int], tmp_path: Path
) -> None:
    settings = LatentSettings(cache=tmp_path)
    pairs = some_pairs()
    first = prepare(sd, pairs, settings)
    count_encodings()
    relabelled = [dataclasses.replace(p, label="a" if p.label == "b" else "b") for p in pairs]
    other = prepare(sd, relabelled, settings)
    swapped = prepare(sd, [p.swap() for p in pairs], settings)
    assert count_encodings() == 0
    assert swapped.key == first.key != other.key
    mine, theirs = first.batch([2], [0], seed=0).latents, other.batch([2], [0], seed=0).latents
    assert torch.equal(mine, theirs.flip(0)) and not torch.equal(mine, theirs)


def test_a_model_that_was_used_is_the_same_model(sd: DiffusionModel) -> None:
    before = prepare(load_model(sd.settings), some_pairs(1), memory()).key
    used = load_model(sd.settings)
    used.encode_prompts(["a tokenizer remembers how it was last asked to pad"])
    assert prepare(used, some_pairs(1), memory()).key == before


def test_what_changes_the_encodings_changes_the_key(models: dict[str, DiffusionModel], tmp_path: Path) -> None:
    sd, pairs = models["sd"], some_pairs(2)
    base = {"cache": tmp_path}

    def keys(model: DiffusionModel = sd, pairs: list[Preference] = pairs, **options: Any) -> str:
        sizes = transforms.bucket_sizes(LatentSettings(**base, **options), model.resolution, model.multiple)
        return cache._key(model, cache._pairs(pairs), LatentSettings(**base, **options), sizes)

    reference = keys()
    assert reference == keys() == keys(encode_batch=1) == keys(prompt_dropout=0.5) == keys(seed=9)
    assert reference == keys(pairs=[dataclasses.replace(p, item_id=p.item_id + "x") for p in pairs])
    other_vae = load_model(sd.settings)
    with torch.no_grad():
        other_vae.vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    other_text = load_model(sd.settings)
    with torch.no_grad():
        next(other_text.pipeline.text_encoder.parameters())[0, 0] += 1e-3
    views: dict[str, Any] = {"views": 2, "crop": "random"}
    different = [
        keys(other_vae),
        keys(other_text),
        keys(load_model(sd.settings.model_copy(update={"dtype": "bf16"}))),
        keys(load_model(sd.settings.model_copy(update={"resolution": 40}))),
        keys(models["sdxl"]),
        keys(buckets="auto"),
        keys(dtype="fp16"),
        keys(posterior="sample"),
        keys(**views),
        keys(**views, seed=9),
        keys(**views, flip=True),
        keys(**views, pairs=[dataclasses.replace(p, item_id=p.item_id + "x") for p in pairs]),
        keys(pairs=pairs[:1]),
        keys(pairs=pairs[::-1]),
        keys(pairs=[pair(0, "another prompt"), pairs[1]]),
        keys(pairs=[pair(0, a=picture(77)), pairs[1]]),
    ]
    assert len({reference, *different}) == 1 + len(different)


def folder_of(root: Path) -> Path:
    (found,) = [path for path in root.iterdir() if path.is_dir()]
    return found


@pytest.mark.parametrize("damage", ["short", "missing", "index", "escape"])
def test_a_damaged_cache_is_made_again(
    sd: DiffusionModel, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = LatentSettings(cache=tmp_path)
    whole = prepare(sd, some_pairs(), memory())
    prepare(sd, some_pairs(), settings)
    folder = folder_of(tmp_path)
    file = folder / "latents-32x32.npy"
    if damage == "short":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing":
        file.unlink()
    elif damage == "index":
        (folder / "index.json").write_text("{")
    else:
        (folder / "index.json").write_text(json.dumps({"files": {"../../x.npy": 3}}))
    capsys.readouterr()
    assert_same_batches(whole, prepare(sd, some_pairs(), settings))
    assert "is damaged" in capsys.readouterr().err
    assert_same_batches(whole, prepare(sd, some_pairs(), settings))
    assert "is damaged" not in capsys.readouterr().err


def test_no_pickle_is_ever_read(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        arrays.open_array(tmp_path / "x.npy")


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [Interrupted(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_an_interrupted_build_leaves_nothing(
    sd: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    append = arrays.Rows.append
    calls = [0]

    def failing(self: arrays.Rows, rows: Any) -> None:
        calls[0] += 1
        if calls[0] == 5:
            raise error
        append(self, rows)

    monkeypatch.setattr(arrays.Rows, "append", failing)
    expected = UserError if isinstance(error, OSError) else Interrupted
    with pytest.raises(expected) as caught:
        prepare(sd, some_pairs(), LatentSettings(cache=tmp_path, encode_batch=2))
    assert not any(path.is_dir() for path in tmp_path.iterdir())
    if expected is UserError:
        assert "No space left on device" in str(caught.value) and "data.cache" in str(caught.value)
    monkeypatch.undo()
    done = prepare(sd, some_pairs(), LatentSettings(cache=tmp_path, encode_batch=2))
    assert_same_batches(prepare(sd, some_pairs(), memory(encode_batch=2)), done)


def test_a_killed_build_is_never_mistaken_for_a_result(tmp_path: Path) -> None:
    program = f"""
    import os, signal
    from pathlib import Path
    import numpy as np
    from diffusion import arrays
    def fill(folder):
        rows = folder.rows("x", (3, 2), "<f4")
        rows.append(np.ones((2, 2)))
        os.kill(os.getpid(), signal.SIGKILL)
    arrays.on_disk(Path({str(tmp_path)!r}), "key", fill)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=Path(__file__).parent.parent)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "key").exists()
    made = arrays.on_disk(tmp_path, "key", lambda folder: folder.add("x", np.arange(4)))
    assert made["x"].tolist() == [0, 1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["key"]


def test_rows_are_counted() -> None:
    rows = arrays.Rows(None, (3, 2), "<f4")
    rows.append(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="2 of 3 rows"):
        rows.finish()
    for wrong in (np.zeros((2, 2)), np.zeros((1, 3))):
        with pytest.raises(ValueError, match="do not fit"):
            rows.append(wrong)


# ----------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "there are no pairs to train on"),
        ([pair(0), pair(0)], "two pairs have the id 'pair-0'"),
        ([pair(0, label="tie")], r"pair 'pair-0' is a tie.*data\.pairing\.ties"),
        ([pair(0, a=Media(data=b"junk", place="row 7"))], r"pair 'pair-0': cannot decode the image.*row 7"),
        ([pair(3, a="a text")], "pair 'pair-3' prefers texts, not pictures"),
    ],
)
@pytest.mark.parametrize("buckets", ["square", "auto"])
def test_mistakes_in_the_pairs(sd: DiffusionModel, pairs: Any, message: str, buckets: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        prepare(sd, pairs, LatentSettings(cache=tmp_path, buckets=buckets))
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_an_image_that_is_gone_is_named(sd: DiffusionModel, tmp_path: Path) -> None:
    gone = Media(path="gone.png", root=str(tmp_path), digest="0" * 64)
    with pytest.raises(UserError, match=r"pair 'pair-0': .*gone\.png"):
        prepare(sd, [pair(0, a=gone)], memory())
