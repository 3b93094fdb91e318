"""ImageReward: our port against a forward written from the papers, on random weights named as the published ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_scorers import PHOTOS, PROMPTS, head, pixels
from torch import Tensor
from torch.nn import functional

from evaluators.preprocess import TOLERANCE, Preprocess, TensorScorer
from evaluators.scorer import Scorer, load, main_scores
from mmalign.errors import UserError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", "a", "photo", "of", "cat", "two", "dogs", "on", "beach"]
WORDS += ["oil", "painting", "tokyo", "at", "night"]
VISION, TEXT, PATCH, SIDE, LAYERS = 128, 64, 8, 32, 2  # widths: two heads and one


def checkpoint(seed: int = 0) -> dict[str, Tensor]:
    """Random tensors with all names of ImageReward.pt, those that are of no use included."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def linear(name: str, out: int, into: int) -> None:
        state[f"{name}.weight"] = torch.randn(out, into, generator=generator) * 0.8 / into**0.5
        state[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.2

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
        state[f"{name}.bias"] = 0.2 * torch.randn(width, generator=generator)

    v, t = "blip.visual_encoder", "blip.text_encoder"
    state[f"{v}.cls_token"] = torch.randn(1, 1, VISION, generator=generator)
    state[f"{v}.pos_embed"] = torch.randn(1, (SIDE // PATCH) ** 2 + 1, VISION, generator=generator)
    linear(f"{v}.patch_embed.proj", VISION, 3 * PATCH * PATCH)
    state[f"{v}.patch_embed.proj.weight"] = state[f"{v}.patch_embed.proj.weight"].view(VISION, 3, PATCH, PATCH)
    for layer in range(LAYERS):
        block = f"{v}.blocks.{layer}"
        for name, out, into in (
            ("attn.qkv", 3 * VISION, VISION),
            ("attn.proj", VISION, VISION),
            ("mlp.fc1", 96, VISION),
            ("mlp.fc2", VISION, 96),
        ):
            linear(f"{block}.{name}", out, into)
        norm(f"{block}.norm1", VISION)
        norm(f"{block}.norm2", VISION)
    norm(f"{v}.norm", VISION)
    for name, rows in (("word", len(WORDS) + 2), ("position", 40)):
        state[f"{t}.embeddings.{name}_embeddings.weight"] = torch.randn(rows, TEXT, generator=generator)
    state[f"{t}.embeddings.position_ids"] = torch.arange(40)[None]
    norm(f"{t}.embeddings.LayerNorm", TEXT)
    for layer in range(LAYERS):
        block = f"{t}.encoder.layer.{layer}"
        for kind, source in (("attention", TEXT), ("crossattention", VISION)):
            linear(f"{block}.{kind}.self.query", TEXT, TEXT)
            linear(f"{block}.{kind}.self.key", TEXT, source)
            linear(f"{block}.{kind}.self.value", TEXT, source)
            linear(f"{block}.{kind}.output.dense", TEXT, TEXT)
            norm(f"{block}.{kind}.output.LayerNorm", TEXT)
        linear(f"{block}.intermediate.dense", 80, TEXT)
        linear(f"{block}.output.dense", TEXT, 80)
        norm(f"{block}.output.LayerNorm", TEXT)
    linear("blip.vision_proj", 16, VISION)
    linear("blip.text_proj", 16, TEXT)
    return state | {f"mlp.layers.{name}": value.clone() for name, value in head(TEXT).state_dict().items()}


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        weights = weights.masked_fill(mask[:, None, None, :] == 0, -torch.inf)
    return (weights.softmax(-1) @ v).transpose(1, 2).flatten(2)


def written_out(state: dict[str, Tensor], ids: Tensor, mask: Tensor, pictures: Tensor) -> Tensor:
    """The published model, layer by layer, from the tensors as they are named in the file."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    v, t = "blip.visual_encoder", "blip.text_encoder"
    patches = (
        pictures.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    )
    x = patches @ state[f"{v}.patch_embed.proj.weight"].flatten(1).T + state[f"{v}.patch_embed.proj.bias"]
    x = torch.cat([state[f"{v}.cls_token"].expand(len(x), -1, -1), x], 1) + state[f"{v}.pos_embed"]
    for layer in range(LAYERS):
        block = f"{v}.blocks.{layer}"
        q, k, values = linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, -1)
        x = x + linear(attend(q, k, values, VISION // 64), f"{block}.attn.proj")
        inner = functional.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
        x = x + linear(inner, f"{block}.mlp.fc2")
    seen = norm(x, f"{v}.norm", 1e-6)
    words, places = (state[f"{t}.embeddings.{name}_embeddings.weight"] for name in ("word", "position"))
    h = norm(words[ids] + places[: ids.shape[1]], f"{t}.embeddings.LayerNorm", 1e-12)
    for layer in range(LAYERS):
        block = f"{t}.encoder.layer.{layer}"
        for kind, source, hidden in (("attention", h, mask), ("crossattention", seen, None)):
            name = f"{block}.{kind}"
            source = h if kind == "attention" else source
            q, k, values = (
                linear(x, f"{name}.self.{part}") for x, part in ((h, "query"), (source, "key"), (source, "value"))
            )
            mixed = linear(attend(q, k, values, TEXT // 64, hidden), f"{name}.output.dense")
            h = norm(h + mixed, f"{name}.output.LayerNorm", 1e-12)
        inner = functional.gelu(linear(h, f"{block}.intermediate.dense"))
        h = norm(h + linear(inner, f"{block}.output.dense"), f"{block}.output.LayerNorm", 1e-12)
    first = h[:, 0]
    for number in (0, 2, 4, 6, 7):
        first = linear(first, f"mlp.layers.{number}")
    return (first.squeeze(-1) - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    for name in ("imagereward", "bert-base-uncased"):
        (folder / name).mkdir()
    torch.save(checkpoint(), folder / "imagereward" / "ImageReward.pt")
    (folder / "bert-base-uncased" / "vocab.txt").write_text("\n".join(WORDS))
    return folder


@pytest.fixture(autouse=True)
def _weights(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMALIGN_WEIGHTS", str(root))


@pytest.fixture(scope="module")
def scorer(root: Path) -> Scorer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMALIGN_WEIGHTS", str(root))
        return load("imagereward", {"device": "cpu"})


def test_the_port_is_the_published_model(root: Path, scorer: Scorer) -> None:
    def ids(prompt: str) -> list[int]:
        words = prompt.lower().replace(",", " ,").split()
        return [WORDS.index(word) for word in ("[CLS]", *words, "[SEP]")]

    rows = [ids(prompt) for prompt in PROMPTS]
    assert len(rows[1]) > len(rows[0]) > 5
    tokens = torch.tensor([row + [0] * (35 - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (35 - len(row)) for row in rows])
    expected = written_out(checkpoint(), tokens, mask, Preprocess(size=SIDE).images(PHOTOS))
    values = main_scores(scorer, PROMPTS, PHOTOS)
    assert values == pytest.approx(expected.tolist(), abs=2e-5)
    assert min(abs(a - b) for i, a in enumerate(values) for b in values[:i]) > 1e-3


def test_it_reloads_bit_by_bit_and_a_batch_equals_its_singletons(scorer: Scorer) -> None:
    together = main_scores(scorer, PROMPTS, PHOTOS)
    again = load("imagereward", {"device": "cpu"})
    assert main_scores(again, PROMPTS, PHOTOS) == together and again.identity == scorer.identity
    alone = [main_scores(scorer, [p], [i])[0] for p, i in zip(PROMPTS, PHOTOS, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)
    assert scorer.identity.startswith("imagereward@1.0#")
    assert scorer.score_images([], []) == []


def test_pil_and_tensors_agree_and_gradients_reach_the_pixels(scorer: Scorer) -> None:
    assert isinstance(scorer, TensorScorer)
    for prompt, image in zip(PROMPTS, PHOTOS, strict=True):
        by_tensor = float(scorer.score_tensors([prompt], pixels(image)))
        assert main_scores(scorer, [prompt], [image])[0] == pytest.approx(by_tensor, abs=10 * TOLERANCE)
    batch = torch.cat([pixels(photo.resize((48, 40))) for photo in PHOTOS]).requires_grad_()
    scorer.score_tensors(PROMPTS, batch).sum().backward()
    assert batch.grad is not None and bool(batch.grad.isfinite().all())
    assert bool((batch.grad.abs().amax((1, 2, 3)) > 0).all())


def test_a_prompt_is_cut_behind_its_35_tokens(scorer: Scorer) -> None:
    values = main_scores(scorer, ["cat " * 60, "cat " * 33, "cat " * 32], PHOTOS[:1] * 3)
    assert values[0] == values[1] != values[2]


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "partial": (lambda s: s.pop("blip.text_encoder.encoder.layer.1.output.dense.bias"), "1 tensors missing, the first"),
    "no vision": (lambda s: s.pop("blip.visual_encoder.pos_embed"), "'visual_encoder.pos_embed' is missing"),
    "more": (lambda s: s.update({"blip.visual_encoder.extra": torch.zeros(1)}), "1 tensors of nothing in the model"),
    "stray": (lambda s: s.update({"optimizer": torch.zeros(1)}), "'optimizer' is no part of ImageReward"),
    "shape": (lambda s: s.update({"blip.visual_encoder.norm.weight": torch.zeros(3)}), "1 tensors of another shape"),
    "no head": (lambda s: s.pop("mlp.layers.4.bias"), "not the head of a scorer: 'layers.4.bias'"),
}


@pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG)
def test_wrong_or_partial_weights_are_refused_in_a_line(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], said: str
) -> None:
    state = checkpoint()
    change(state)
    torch.save(state, tmp_path / "ImageReward.pt")
    with pytest.raises(UserError, match=said) as caught:
        load("imagereward", {"path": str(tmp_path), "device": "cpu"})
    assert "\n" not in str(caught.value)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, "more", "and", "more2"]))
    with pytest.raises(UserError, match="the vocabulary has"):
        load("imagereward", {"vocabulary": str(tmp_path), "device": "cpu"})
    with pytest.raises(UserError, match=r"no vocab\.txt for bert-base-uncased"):
        load("imagereward", {"vocabulary": str(tmp_path / "nowhere"), "device": "cpu"})
