"""The CLIP family: real loading of random weights in the published containers, formulas, PIL and tensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_scorers import ARCHITECTURE, PHOTOS, PROMPTS, head, pixels, write_clip, write_hps
from torch import Tensor, nn
from torch.nn import functional

from evaluators.heads import fold
from evaluators.preprocess import COSINE, TOLERANCE, Preprocess, TensorScorer
from evaluators.scorer import Scorer, known, load, main_scores
from mmalign.errors import UserError


class Site:
    """Published files below one folder: the folder of weights."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.clip = write_clip(root / "pickscore", seed=1)
        write_clip(root / "clipscore", seed=5)
        write_clip(root / "clip-vit-large-patch14", seed=3)
        (root / "hpsv2").mkdir()
        self.hps = write_hps(root / "hpsv2" / "HPS_v2.1_compressed.pt", seed=4)
        (root / "aesthetic").mkdir()
        self.head = head(32)
        self.save_head(root / "aesthetic" / "sac+logos+ava1-l14-linearMSE.pth")

    def save_head(self, file: Path) -> None:
        torch.save({f"layers.{name}": value for name, value in self.head.state_dict().items()}, file)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("weights"))


@pytest.fixture(autouse=True)
def _weights(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMALIGN_WEIGHTS", str(site.root))


OPTIONS: dict[str, dict[str, Any]] = {
    "clipscore": {},
    "pickscore": {},
    "hpsv2": {"architecture": ARCHITECTURE},
    "aesthetic": {},
}


def opened(name: str, **more: Any) -> Scorer:
    return load(name, {**OPTIONS[name], "device": "cpu", **more})


@pytest.fixture(scope="module")
def scorers(site: Site) -> dict[str, Scorer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMALIGN_WEIGHTS", str(site.root))
        return {name: opened(name) for name in OPTIONS}


each = pytest.mark.parametrize("name", OPTIONS)


# -------------------------------------------------------------------------------------------------------- every one


@each
def test_a_scorer_is_found_in_the_folder_of_weights_and_reloads_bit_by_bit(
    name: str, scorers: dict[str, Scorer]
) -> None:
    again = opened(name)
    assert again.identity == scorers[name].identity
    assert main_scores(again, PROMPTS, PHOTOS) == main_scores(scorers[name], PROMPTS, PHOTOS)
    assert again.identity.startswith(f"{name}@") and len(again.identity.partition("#")[2]) == 8
    assert name in known() and isinstance(again, TensorScorer)


@each
def test_a_batch_equals_its_singletons(name: str, scorers: dict[str, Scorer]) -> None:
    together = main_scores(scorers[name], PROMPTS, PHOTOS)
    alone = [main_scores(scorers[name], [p], [i])[0] for p, i in zip(PROMPTS, PHOTOS, strict=True)]
    backwards = main_scores(opened(name), PROMPTS[::-1], PHOTOS[::-1])[::-1]
    assert together == pytest.approx(alone, abs=1e-5, rel=1e-5)
    assert together == pytest.approx(backwards, abs=1e-5, rel=1e-5)
    assert len({round(value, 6) for value in together}) == len(together)
    assert scorers[name].score_images([], []) == []


@each
def test_pil_and_tensors_agree_within_the_stated_tolerance(name: str, scorers: dict[str, Scorer]) -> None:
    scorer = scorers[name]
    assert isinstance(scorer, TensorScorer)
    scale = {"clipscore": 2.5, "pickscore": 100.0, "hpsv2": 1.0}.get(name)
    for prompt, image in zip(PROMPTS, PHOTOS, strict=True):
        by_pil, by_tensor = (
            main_scores(scorer, [prompt], [image])[0],
            float(scorer.score_tensors([prompt], pixels(image))),
        )
        norm = float(scorer._head.weight.norm()) if scale is None else scale  # type: ignore[attr-defined]  # aesthetic's
        # a unit vector that moved so little that its cosine with itself is 1 - COSINE would move by sqrt(2 COSINE)
        assert abs(by_pil - by_tensor) <= (COSINE if scale else math.sqrt(2 * COSINE)) * norm
    # nothing to resize: the same numbers, but for the last digits
    square = PHOTOS[0].resize((32, 32))
    assert main_scores(scorer, PROMPTS[:1], [square]) == pytest.approx(
        scorer.score_tensors(PROMPTS[:1], pixels(square)).tolist(), abs=1e-5, rel=1e-5
    )


@each
def test_gradients_reach_the_pixels_and_are_finite(name: str, scorers: dict[str, Scorer]) -> None:
    scorer = scorers[name]
    assert isinstance(scorer, TensorScorer)
    batch = torch.cat([pixels(photo.resize((48, 40))) for photo in PHOTOS]).requires_grad_()
    values = scorer.score_tensors(PROMPTS, batch)
    assert values.shape == (4,) and values.dtype == torch.float32
    values.sum().backward()
    assert batch.grad is not None and bool(batch.grad.isfinite().all())
    assert bool((batch.grad.abs().amax((1, 2, 3)) > 0).all())


@each
def test_half_precision_is_another_version_and_nearly_the_same(name: str, scorers: dict[str, Scorer]) -> None:
    half = opened(name, precision="bf16")
    assert half.identity.partition("#")[0] == scorers[name].identity.partition("#")[0] + "-bf16"
    full = main_scores(scorers[name], PROMPTS, PHOTOS)
    assert main_scores(half, PROMPTS, PHOTOS) == pytest.approx(full, abs=0.05 * max(map(abs, full)))


# --------------------------------------------------------------------------------------------------------- formulas


def reference(model: Any, text: str, image: Image.Image) -> Tensor:
    """The cosine by transformers' own forward, with open_clip's tokenizer and PIL transform."""
    transform = open_clip.image_transform(32, is_train=False)
    with torch.no_grad():
        out = model(input_ids=open_clip.tokenize([text]), pixel_values=transform(image)[None])
    return (out.text_embeds * out.image_embeds).sum()


def test_pickscore_is_the_scaled_cosine_of_the_published_forward(site: Site, scorers: dict[str, Scorer]) -> None:
    with torch.no_grad():
        published = [
            float(
                site.clip(
                    input_ids=open_clip.tokenize([prompt]),
                    pixel_values=open_clip.image_transform(32, is_train=False)(image)[None],
                ).logits_per_image
            )
            for prompt, image in zip(PROMPTS, PHOTOS, strict=True)
        ]
    assert main_scores(scorers["pickscore"], PROMPTS, PHOTOS) == pytest.approx(published, abs=1e-3)
    assert max(map(abs, published)) > 1  # in units of 100 cosines


def test_clipscore_is_hessels(site: Site, scorers: dict[str, Scorer], tmp_path: Path) -> None:
    model = write_clip(tmp_path / "again", seed=5)
    cosines = [float(reference(model, f"A photo depicts {p}", i)) for p, i in zip(PROMPTS, PHOTOS, strict=True)]
    assert min(cosines) > 0
    expected = [2.5 * cosine for cosine in cosines]
    assert main_scores(scorers["clipscore"], PROMPTS, PHOTOS) == pytest.approx(expected, abs=1e-5)
    raw = load("clip", {"path": str(site.root / "clipscore"), "device": "cpu"})
    bare = [float(reference(model, prompt, image)) for prompt, image in zip(PROMPTS, PHOTOS, strict=True)]
    assert main_scores(raw, PROMPTS, PHOTOS) == pytest.approx(bare, abs=1e-5)


def test_clipscore_is_never_below_zero(tmp_path: Path) -> None:
    write_clip(tmp_path / "other", seed=2)
    raw = load("clip", {"path": str(tmp_path / "other"), "device": "cpu"})
    assert max(main_scores(raw, PROMPTS, PHOTOS)) < 0
    assert main_scores(opened("clipscore", path=str(tmp_path / "other")), PROMPTS, PHOTOS) == [0.0] * 4


def test_hpsv2_is_open_clips_cosine_of_letterboxed_pictures(site: Site, scorers: dict[str, Scorer]) -> None:
    transform = open_clip.image_transform(32, is_train=False, resize_mode="longest", fill_color=0)
    tokens = open_clip.get_tokenizer(ARCHITECTURE)(PROMPTS)
    with torch.no_grad():
        text = functional.normalize(site.hps.encode_text(tokens), dim=-1)
        image = functional.normalize(site.hps.encode_image(torch.stack([transform(i) for i in PHOTOS])), dim=-1)
    assert main_scores(scorers["hpsv2"], PROMPTS, PHOTOS) == pytest.approx((text * image).sum(-1).tolist(), abs=1e-5)


def test_the_aesthetic_head_is_the_published_layers_folded(site: Site, scorers: dict[str, Scorer]) -> None:
    scorer: Any = scorers["aesthetic"]
    features = scorer.image_features(PHOTOS)
    assert features.norm(dim=-1).tolist() == pytest.approx([1.0] * 4, abs=1e-6)
    with torch.no_grad():
        expected = site.head(features).squeeze(-1).tolist()
    assert main_scores(scorer, PROMPTS, PHOTOS) == pytest.approx(expected, abs=1e-5)
    assert main_scores(scorer, ["something else"] * 4, PHOTOS) == main_scores(scorer, PROMPTS, PHOTOS)


def test_a_fold_refuses_what_is_not_one() -> None:
    layers = {f"layers.{name}": value for name, value in head(8).state_dict().items()}
    folded = fold(layers, width=8, place="x")
    x = torch.randn(5, 8)
    torch.testing.assert_close(folded(x), head(8)(x).squeeze(-1).detach(), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match=r"layer 0 of the head is \(40, 8\), it is given 9 numbers"):
        fold(layers, width=9, place="x")
    with pytest.raises(UserError, match="not the head of a scorer: 'other'"):
        fold({**layers, "other": x}, width=8, place="x")
    last = {name: value for name, value in layers.items() if not name.startswith("layers.7")}
    with pytest.raises(UserError, match="gives 6 numbers"):
        fold(last, width=8, place="x")


# ------------------------------------------------------------------------------------------------------ pixels


@pytest.mark.parametrize("fit", ["shortest", "longest", "squash"])
def test_pil_preprocessing_is_open_clips(fit: Any) -> None:
    transform = open_clip.image_transform(32, is_train=False, resize_mode=fit, fill_color=0)
    own = Preprocess(size=32, fit=fit)
    for image in [*PHOTOS, PHOTOS[1].resize((333, 20)), PHOTOS[1].resize((9, 31))]:
        torch.testing.assert_close(own.images([image])[0], transform(image), atol=2e-6, rtol=0)


@pytest.mark.parametrize("fit", ["shortest", "longest", "squash"])
def test_tensor_preprocessing_is_within_tolerance_of_pil(fit: Any) -> None:
    own = Preprocess(size=32, fit=fit)
    for image in [*PHOTOS, PHOTOS[1].resize((333, 20))]:
        by_tensor = own.tensors(pixels(image))[0]
        assert by_tensor.shape == (3, 32, 32)
        # a twentieth of the sides differ by rounding where sides are so short; real ones have 224 pixels
        assert float((by_tensor - own.images([image])[0]).abs().mean()) < 2 * TOLERANCE
    own = Preprocess(size=224, fit=fit)
    assert float((own.tensors(pixels(PHOTOS[3]))[0] - own.images([PHOTOS[3]])[0]).abs().mean()) < TOLERANCE


def test_letterboxes_are_black_before_they_are_normalised() -> None:
    own = Preprocess(size=32, fit="longest")
    black = [(0 - mean) / std for mean, std in zip(own.mean, own.std, strict=True)]
    for made in (own.images([PHOTOS[3]])[0], own.tensors(pixels(PHOTOS[3]))[0]):
        assert made[:, 0, :].mean(1).tolist() == pytest.approx(black, abs=1e-6)


def test_a_line_is_no_picture() -> None:
    with pytest.raises(UserError, match="a picture of 4000 x 2 is a line"):
        Preprocess(size=224).images([Image.new("RGB", (4000, 2))])


# ----------------------------------------------------------------------------------------------------- texts


def test_a_text_is_embedded_once(site: Site) -> None:
    scorer: Any = opened("pickscore")
    calls: list[list[str]] = []
    encode = scorer.tower.texts._encode
    scorer.tower.texts._encode = lambda texts: calls.append(texts) or encode(texts)
    main_scores(scorer, PROMPTS, PHOTOS)
    main_scores(scorer, PROMPTS[::-1], PHOTOS)
    assert calls == [[PROMPTS[0], PROMPTS[1], PROMPTS[3]]]


def test_a_prompt_that_is_too_long_keeps_its_end_token(scorers: dict[str, Scorer]) -> None:
    # cut off without the end token, the text tower would be read at another place and give another number
    values = main_scores(scorers["pickscore"], ["word " * 300, "word " * 75, "word " * 74], PHOTOS[:1] * 3)
    assert values[0] == values[1] and abs(values[1] - values[2]) > 1e-6


# ------------------------------------------------------------------------------------------------- wrong weights


def copy_clip(site: Site, folder: Path, change: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_bytes((site.root / "pickscore" / "config.json").read_bytes())
    state = load_file(site.root / "pickscore" / "model.safetensors")
    save_file(change(state), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def without(name: str) -> Any:
    return lambda state: {key: value for key, value in state.items() if key != name}


CHANGES = {
    "partial": (without("visual_projection.weight"), "1 tensors missing, the first 'visual_projection.weight'"),
    "more": (
        lambda s: {**s, "head.weight": torch.zeros(3)},
        "1 tensors of nothing in the model, the first 'head.weight'",
    ),
    "shape": (lambda s: {**s, "visual_projection.weight": torch.zeros(7, 7)}, "."),
}


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES)
def test_a_folder_with_other_weights_is_refused_in_a_line(
    site: Site, tmp_path: Path, change: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_clip(site, tmp_path / "copy", change)
    with pytest.raises(UserError, match=said) as caught:
        opened("pickscore", path=str(folder))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert capsys.readouterr().err == ""


def test_a_damaged_folder_is_refused_in_a_line(site: Site, tmp_path: Path) -> None:
    folder = copy_clip(site, tmp_path / "copy", dict)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="the model cannot be loaded"):
        opened("pickscore", path=str(folder))


def test_old_position_ids_are_no_weights(site: Site, tmp_path: Path, scorers: dict[str, Scorer]) -> None:
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    folder = copy_clip(site, tmp_path / "copy", lambda state: {**state, **ids})
    scorer = opened("pickscore", path=str(folder))
    assert scorer.identity == scorers["pickscore"].identity


def test_other_weights_are_another_identity(site: Site, tmp_path: Path, scorers: dict[str, Scorer]) -> None:
    other = {"logit_scale": torch.tensor(4.0)}
    folder = copy_clip(site, tmp_path / "copy", lambda state: {**state, **other})
    assert opened("pickscore", path=str(folder)).identity != scorers["pickscore"].identity


def test_a_checkpoint_of_another_model_is_refused(site: Site, tmp_path: Path) -> None:
    file = tmp_path / "HPS_v2.1_compressed.pt"
    state = site.hps.state_dict()
    torch.save({"state_dict": {**without("visual.proj")(state), "extra": torch.zeros(1)}}, file)
    said = r"1 tensors missing, the first 'visual.proj'; 1 tensors of nothing in the model, the first 'extra' \("
    with pytest.raises(UserError, match=said):
        opened("hpsv2", path=str(file))
    with pytest.raises(UserError, match="tensors missing"):
        load("hpsv2", {"path": str(file), "device": "cpu", "architecture": "ViT-B-32"})
    with pytest.raises(UserError, match="open_clip has no architecture 'ViT-Z'"):
        load("hpsv2", {"path": str(file), "architecture": "ViT-Z"})
    with pytest.raises(UserError, match=r"no version '2\.2'"):
        load("hpsv2", {"version": "2.2"})


class Harmful:
    """What a pickle would run."""

    def __reduce__(self) -> Any:
        return print, ("ran",)


def test_a_checkpoint_that_would_run_code_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "weights.pt"
    torch.save({"state_dict": {"a": torch.zeros(1), "b": Harmful()}}, file)
    with pytest.raises(UserError, match="more than tensors"):
        opened("hpsv2", path=str(file))
    assert "ran" not in capsys.readouterr().out
    file.write_bytes(b"not a checkpoint at all")
    with pytest.raises(UserError, match=r"cannot be read|more than tensors"):
        opened("hpsv2", path=str(file))
    torch.save({"lr": 0.1}, file)
    with pytest.raises(UserError, match="not a state dict of tensors"):
        opened("hpsv2", path=str(file))


def test_a_wrapped_checkpoint_is_the_same_scorer(site: Site, tmp_path: Path, scorers: dict[str, Scorer]) -> None:
    wrapped, plain = tmp_path / "HPS_v2.1_compressed.pt", tmp_path / "plain.safetensors"
    torch.save({f"module.{name}": value for name, value in site.hps.state_dict().items()}, wrapped)
    save_file(site.hps.state_dict(), plain)
    for path in (tmp_path, plain):
        assert opened("hpsv2", path=str(path)).identity == scorers["hpsv2"].identity


def test_a_text_tower_that_is_read_at_another_token_is_refused(tmp_path: Path) -> None:
    write_clip(tmp_path / "odd", eos=7)
    with pytest.raises(UserError, match="read at token 7, the tokenizer ends texts with 49407"):
        opened("pickscore", path=str(tmp_path / "odd"))


# ---------------------------------------------------------------------------------------------- where they are


@pytest.mark.parametrize("name", OPTIONS)
def test_missing_weights_say_name_source_size_and_licence(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MMALIGN_WEIGHTS", str(tmp_path))
    said = rf"the weights of {name} are not here: .*about [\d.]+ [GM]B, licence .*looked for {tmp_path}"
    with pytest.raises(UserError, match=said) as caught:
        opened(name)
    said = str(caught.value)
    # the aesthetic head is published on no hub, so nothing could be allowed
    assert "\n" not in said and ("hub cache" in said) == ("MMALIGN_DOWNLOAD=1" in said) == (name != "aesthetic")


def test_the_hub_cache_is_looked_at_and_the_hub_is_not_asked_unless_allowed(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scorers: dict[str, Scorer]
) -> None:
    import huggingface_hub

    cached = str(site.root / "pickscore" / "config.json")
    monkeypatch.setenv("MMALIGN_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: cached)
    assert opened("pickscore").identity == scorers["pickscore"].identity
    monkeypatch.undo()
    monkeypatch.setenv("MMALIGN_WEIGHTS", str(tmp_path))
    asked: list[str] = []

    def snapshot(repo: str, **options: Any) -> str:
        asked.append(repo)
        return str(site.root / "pickscore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match="are not here"):
        opened("pickscore")
    assert asked == []
    assert opened("pickscore", download=True).identity == scorers["pickscore"].identity
    monkeypatch.setenv("MMALIGN_DOWNLOAD", "1")
    opened("clipscore", path="someone/their-clip")
    assert asked == ["yuvalkirstain/PickScore_v1", "someone/their-clip"]


def test_a_trained_clip_loads_back_as_a_scorer(site: Site, scorers: dict[str, Scorer]) -> None:
    folder = str(site.root / "pickscore")
    assert opened("pickscore", path=folder).identity == scorers["pickscore"].identity
    cosines = main_scores(load("clip", {"path": folder, "device": "cpu"}), PROMPTS, PHOTOS)
    assert main_scores(scorers["pickscore"], PROMPTS, PHOTOS) == pytest.approx([100 * c for c in cosines], rel=1e-4)
    assert isinstance(site.head, nn.Sequential)
