"""VQAScore and ratings by vision-language models of every family, and the pairwise judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_vlms
import torch
from safetensors.torch import load_file, save_file
from tiny_scorers import PHOTOS, pixels

from evaluators.chat import ChatModel, token_ids
from evaluators.preprocess import TensorScorer
from evaluators.scorer import Scorer, load, main_scores
from mmalign.errors import UserError

PROMPTS = ["a cat", "two dogs on the red mat.", "is there no image?", "yes"]
NAMES = ("vqascore", "rating")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vlms.write("llava", tmp_path_factory.mktemp("vlm") / "llava", seed=3)


def opened(name: str, path: Path, **more: Any) -> Scorer:
    return load(name, {"path": str(path), "device": "cpu", **more})


@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_a_batch_equals_its_singletons_in_every_family(family: str, tmp_path: Path) -> None:
    scorer = opened("vqascore", tiny_vlms.write(family, tmp_path / "m", seed=3), main="log_odds")
    together = main_scores(scorer, PROMPTS, PHOTOS)
    alone = [main_scores(scorer, [p], [i])[0] for p, i in zip(PROMPTS, PHOTOS, strict=True)]
    assert together == pytest.approx(alone, abs=2e-4)
    assert len({round(value, 5) for value in together}) == 4


def test_vqascore_is_the_formula_on_the_models_own_logits(llava: Path) -> None:
    scorer = opened("vqascore", llava)
    rows = scorer.score_images(PROMPTS, PHOTOS)
    network, processor = tiny_vlms.make("llava", seed=3)
    vocabulary = processor.tokenizer.get_vocab()
    yes, no = ([vocabulary[w] for w in words if w in vocabulary] for words in (("yes", "Ġyes"), ("no", "Ġno")))
    assert yes and no
    for prompt, image, row in zip(PROMPTS, PHOTOS, rows, strict=True):
        asked = f'USER: <image>\nDoes this figure show "{prompt}"? Please answer Yes or No. ASSISTANT:'
        inputs = processor(text=[asked], images=[image], return_tensors="pt")
        with torch.no_grad():
            p = network(**inputs).logits[0, -1].softmax(-1)
        p_yes, p_no = float(p[yes].sum()), float(p[no].sum())
        assert row["vqa_full"] == pytest.approx(p_yes, rel=1e-3)
        assert row["vqa_norm"] == pytest.approx(p_yes / (p_yes + p_no), rel=1e-3)
        assert row["log_odds"] == pytest.approx(float(torch.tensor(p_yes / p_no).log()), abs=1e-3)
    assert scorer.main == "vqa_norm" and set(rows[0]) == set(scorer.numbers)


def test_a_rating_is_the_expected_digit(llava: Path) -> None:
    model = ChatModel(llava, device="cpu")
    question = "rate {prompt} of 3"
    scorer = opened("rating", llava, question=question, digits=3)
    log_probs = model.next_token([f"rate {prompt} of 3" for prompt in PROMPTS], [[image] for image in PHOTOS])
    ids = [int(token_ids(model.tokenizer, [str(k)], place="here")[0]) for k in (1, 2, 3)]
    p = log_probs[:, ids].exp()
    expected = (p * torch.tensor([1.0, 2.0, 3.0])).sum(-1) / p.sum(-1)
    assert main_scores(scorer, PROMPTS, PHOTOS) == pytest.approx(expected.tolist(), abs=1e-5)
    assert all(1 <= value <= 5 for value in main_scores(opened("rating", llava), PROMPTS, PHOTOS))


@pytest.mark.parametrize("name", NAMES)
def test_it_reloads_bit_by_bit(name: str, llava: Path) -> None:
    first, again = opened(name, llava), opened(name, llava)
    assert main_scores(first, PROMPTS, PHOTOS) == main_scores(again, PROMPTS, PHOTOS)
    assert first.identity == again.identity and first.identity.startswith(f"{name}@1#")
    assert opened(name, llava, question="{prompt}?").identity != first.identity
    assert opened(name, llava, prefix="<think></think>").identity != first.identity
    assert first.score_images([], []) == []


@pytest.mark.parametrize("name", NAMES)
def test_pil_and_tensors_agree_and_gradients_reach_the_pixels(name: str, llava: Path) -> None:
    scorer = opened(name, llava)
    assert isinstance(scorer, TensorScorer)
    for prompt, image in zip(PROMPTS, PHOTOS, strict=True):
        by_tensor = float(scorer.score_tensors([prompt], pixels(image)))
        assert main_scores(scorer, [prompt], [image])[0] == pytest.approx(by_tensor, abs=0.02)
    batch = torch.cat([pixels(photo.resize((40, 48))) for photo in PHOTOS]).requires_grad_()
    scorer.score_tensors(PROMPTS, batch).sum().backward()
    assert batch.grad is not None and bool(batch.grad.isfinite().all())
    assert bool((batch.grad.abs().amax((1, 2, 3)) > 0).all())


def test_a_model_that_cuts_pictures_into_tiles_has_no_gradients(tmp_path: Path) -> None:
    for family in ("llava_next", "qwen2_vl", "smolvlm"):
        scorer: Any = opened("vqascore", tiny_vlms.write(family, tmp_path / family))
        with pytest.raises(UserError, match="so no gradient reaches pixels"):
            scorer.score_tensors(["a cat"], pixels(PHOTOS[0]))


def test_wrong_or_partial_weights_are_refused_in_a_line(llava: Path, tmp_path: Path) -> None:
    folder = tiny_vlms.write("llava", tmp_path / "part")
    file = folder / "model.safetensors"
    state = load_file(file)
    dropped = min(state)
    save_file({name: value for name, value in state.items() if name != dropped}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 tensors missing, the first") as caught:
        opened("vqascore", folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"are not here: Qwen/Qwen2\.5-VL-7B-Instruct, about 16\.6 GB, licence"):
        load("vqascore")


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "number": ("vqascore", {"main": "vqa_nrm"}, "no number 'vqa_nrm'.*vqa_norm"),
    "question": ("vqascore", {"question": "is it good?"}, "does not say where the prompt goes"),
    "rating": ("rating", {"question": "is it good?"}, "does not say where the prompt goes"),
    "digits": ("rating", {"digits": 10}, "2 to 9 digits"),
}


@pytest.mark.parametrize(("name", "options", "said"), WRONG.values(), ids=WRONG)
def test_wrong_options_are_refused_in_a_line(name: str, options: dict[str, Any], said: str, llava: Path) -> None:
    with pytest.raises(UserError, match=said):
        opened(name, llava, **options)


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    network, processor = tiny_vlms.make("llava")
    processor.chat_template = None
    network.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no chat template"):
        opened("vqascore", tmp_path)


def test_a_word_that_is_no_token_is_refused(llava: Path) -> None:
    with pytest.raises(UserError, match="no token for 'perhaps' or 'Perhaps'"):
        token_ids(ChatModel(llava, device="cpu").tokenizer, ["perhaps", "Perhaps"], place="here")
