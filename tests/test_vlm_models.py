"""vlm.models, batch, families, opening and adapters on a tiny random model of every family."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_vlms
import torch
import transformers
from torch import Tensor

from mmalign.errors import UserError
from vlm.adapters import adapters_disabled, add_lora, lora_layers
from vlm.batch import PaddingSide, Row, VlmBatch
from vlm.conversations import Conversation, render
from vlm.models import Policy, TooLongError, VisionLanguageModel, open_model
from vlm.settings import VlmLoraSettings, VlmModelSettings

CHUNK = 3
FAMILIES = tiny_vlms.FAMILIES


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model's folder by family, written once."""
    root, written = tmp_path_factory.mktemp("vlms"), set[str]()

    def folder(name: str) -> Path:
        if name not in written:
            tiny_vlms.write(name, root / name)
            written.add(name)
        return root / name

    return folder


@pytest.fixture
def opened(folders: Callable[[str], Path]) -> Callable[..., VisionLanguageModel]:
    def open_family(name: str, **settings: Any) -> VisionLanguageModel:
        return open_model(VlmModelSettings(path=str(folders(name)), **{"logits_chunk": CHUNK, **settings}))

    return open_family


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, opened: Callable[..., VisionLanguageModel]) -> VisionLanguageModel:
    return opened(request.param)


def talk(question: str, answer: str | None, *pictures: Any) -> Conversation:
    content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": question}]
    return Conversation(
        messages=({"role": "user", "content": content},), images=pictures, answer=answer, place="rows.jsonl row 7"
    )


SQUARE, WIDE, TALL = (tiny_vlms.picture(0), tiny_vlms.picture(1, 90, 30), tiny_vlms.picture(2, 20, 60))
TALKS = (
    talk("is there a cat?", "yes, two dogs on the mat.", SQUARE),
    talk("what is in the images?", "no", WIDE, SQUARE),  # the first row's picture again
    talk("a dog?", "a red cat", TALL),
    talk("is it yes?", "yes"),  # no picture at all
)


def rows_of(model: VisionLanguageModel) -> list[Row]:
    return [model.encode(each) for each in TALKS]


def plain_inputs(model: VisionLanguageModel, each: Conversation) -> dict[str, Tensor]:
    """What the family's own processor makes of a row."""
    text = render(each, model.processor, model.template)
    whole = text.prompt + text.completion
    bos = model.processor.tokenizer.bos_token
    made = model.processor(
        text=[whole],
        images=[list(each.images)] if each.images else None,
        return_tensors="pt",
        add_special_tokens=not (bos and whole.startswith(bos)),
    )
    return dict(made)


def plain_logps(model: VisionLanguageModel, each: Conversation, row: Row) -> Tensor:
    """The plain way: one row alone, the family's own forward, fp32 logits of everything."""
    inputs = plain_inputs(model, each)
    assert inputs["input_ids"][0].tolist() == row.ids.tolist()
    logps = model.network(**inputs).logits[0].float().log_softmax(dim=-1)
    values = [float(logps[t - 1, row.ids[t]]) if row.completion[t] else 0.0 for t in range(len(row))]
    return torch.tensor(values)


def unpadded(batch: VlmBatch, values: Tensor) -> list[Tensor]:
    return [line[keep] for line, keep in zip(values, batch.attention, strict=True)]


# ----------------------------------------------------------------------------------------------------
# Log-probabilities


def test_brute_force(model: VisionLanguageModel) -> None:
    rows = rows_of(model)
    with torch.no_grad():
        expected = [plain_logps(model, each, row) for each, row in zip(TALKS, rows, strict=True)]
        assert max(float(values.min()) for values in expected) < -1  # nothing here is certain
        for side in ("left", "right"):
            batch = model.collate(rows, side=side)
            logps = model.logps(batch)
            for got, values in zip(unpadded(batch, logps.values), expected, strict=True):
                torch.testing.assert_close(got, values, rtol=0, atol=1e-5)
            assert logps.counts().tolist() == [int(row.completion.sum()) for row in rows]
        for row, values in zip(rows, expected, strict=True):
            torch.testing.assert_close(model.logps(model.collate([row])).values[0], values, rtol=0, atol=1e-5)


def test_gradients_are_those_of_the_plain_forward(model: VisionLanguageModel) -> None:
    model.network.requires_grad_(True)
    parameters = dict(model.network.named_parameters())
    rows = rows_of(model)

    def gradients(total: Tensor) -> dict[str, Tensor | None]:
        found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        return dict(zip(parameters, found, strict=True))

    got = gradients(model.logps(model.collate(rows)).sums().sum())
    total = torch.zeros(())
    for each, row in zip(TALKS, rows, strict=True):
        logps = model.network(**plain_inputs(model, each)).logits[0, :-1].log_softmax(dim=-1)
        total = total + (logps.gather(1, row.ids[1:, None])[:, 0] * row.completion[1:]).sum()
    expected = gradients(total)
    touched = [name for name, gradient in expected.items() if gradient is not None and gradient.any()]
    assert any("visual" in n or "vision" in n for n in touched) and any("layers.0" in n for n in touched)
    for name in touched:
        gradient = got[name]
        assert gradient is not None, name
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=2e-5 * max(scale, 1.0))


def test_an_image_is_encoded_once(model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(model)
    batch = VlmBatch.concat([model.collate(rows), model.collate(rows[:1]).repeat(2)])
    assert len(batch) == 6 and len(batch.images) == 3
    assert batch.looks == ((0,), (1, 0), (2,), (), (0,), (0,))
    calls: list[dict[str, Any]] = []
    original = model.network.get_image_features
    monkeypatch.setattr(
        model.network, "get_image_features", lambda **named: calls.append(named) or original(**named), raising=True
    )
    with torch.no_grad():
        whole = model.logps(batch)
        assert len(calls) == 1
        assert len(calls[0]["pixel_values"]) == sum(len(image.tensors["pixel_values"]) for image in batch.images)
        features = model.encode_images(batch.images)
        again = model.logps(batch, features)
    assert len(calls) == 2  # given features are not made again
    assert torch.equal(again.values, whole.values)


def test_frozen_towers_leave_no_graph(opened: Callable[..., VisionLanguageModel]) -> None:
    model = opened("llava")
    images = model.collate(rows_of(model)).images
    add_lora(model.network, model.family, VlmLoraSettings(rank=2))
    features = model.encode_images(images)
    assert features is not None and not model.trains_vision and not features.pooled[0].requires_grad
    assert model.encode_images([]) is None
    other = opened("llava")
    add_lora(other.network, other.family, VlmLoraSettings(rank=2, projector=True))
    features = other.encode_images(images)
    assert features is not None and other.trains_vision and features.pooled[0].requires_grad


def test_policy_is_a_module_with_the_network_in_it(opened: Callable[..., VisionLanguageModel]) -> None:
    model = opened("llava")
    rows, policy = rows_of(model), Policy(model)
    with torch.no_grad():
        sums = policy(model.answers(rows))[0].sum(1)
        torch.testing.assert_close(sums, model.logps(model.collate(rows)).sums(), rtol=1e-5, atol=1e-5)
    assert {id(p) for p in policy.parameters()} == {id(p) for p in model.network.parameters()}


def test_logits_are_never_whole(model: VisionLanguageModel) -> None:
    batch = model.collate(rows_of(model))
    seen: list[int] = []
    head = model.network.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: seen.append(output.numel() // output.shape[-1]))
    with torch.no_grad():
        model.logps(batch)
    assert max(seen) == CHUNK and sum(seen) == int(batch.completion.sum())


# ----------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_stay_intact(model: VisionLanguageModel, side: PaddingSide) -> None:
    rows = rows_of(model)
    with torch.no_grad():
        alone = [model.logps(model.collate([row], side=side)).values[0] for row in rows]

        def check(batch: VlmBatch, order: Sequence[int]) -> None:
            assert len(batch) == len(order)
            values = model.logps(batch).values
            for got, row in zip(unpadded(batch, values), order, strict=True):
                torch.testing.assert_close(got, alone[row], rtol=0, atol=1e-5)

        batch = model.collate(rows, side=side)
        check(batch.select([3, 1]), [3, 1])
        check(batch.select(torch.tensor([1, 1, 0])), [1, 1, 0])
        check(batch.repeat(2), [0, 1, 2, 3] * 2)
        check(VlmBatch.concat([batch.select([2]), batch, batch.select([0, 3])]), [2, 0, 1, 2, 3, 0, 3])
    assert batch.select([3]).images == () and len(batch.select([1]).images) == 2
    assert batch.select([3]).ids.shape[1] == len(rows[3])  # no more padding than needed
    assert torch.equal(batch.select([0, 1, 2, 3]).ids, batch.ids)


def test_batches_padded_unlike_do_not_mix(opened: Callable[..., VisionLanguageModel]) -> None:
    model = opened("llava")
    left, right = (model.collate(rows_of(model), side=side) for side in ("left", "right"))
    with pytest.raises(ValueError, match="padded alike"):
        VlmBatch.concat([left, right])
    assert left.to("cpu").ids.tolist() == left.ids.tolist()


def test_padding_of_id_zero(opened: Callable[..., VisionLanguageModel]) -> None:
    model = opened("llava")
    assert model.pad_id == 0 != model.processor.tokenizer.eos_token_id
    batch = model.collate(rows_of(model))
    assert set(batch.ids[~batch.attention].tolist()) == {0} and not batch.completion[~batch.attention].any()


# ----------------------------------------------------------------------------------------------------
# Rows


def test_what_is_scored(model: VisionLanguageModel) -> None:
    tokenizer, each = model.processor.tokenizer, TALKS[0]
    row, asked = model.encode(each), model.encode(replace(each, answer=None))
    assert not asked.completion.any() and len(asked) < len(row)
    scored = row.ids[row.completion]
    rendered = render(each, model.processor, model.template)
    assert tokenizer.decode(scored) == rendered.completion and str(each.answer) in rendered.completion
    assert tokenizer.eos_token_id in scored.tolist()
    # An answer's prompt is the prompt that generation would be given.
    assert row.ids[: len(asked)].tolist() == asked.ids.tolist() and not row.completion[: len(asked)].any()
    start = tokenizer.bos_token_id
    assert start is None or (row.ids == start).nonzero().flatten().tolist() == [0]  # once


def test_the_answer_never_shares_a_token_with_the_prompt(opened: Callable[..., VisionLanguageModel]) -> None:
    model = opened("llava")
    model.template = tiny_vlms.CHAT.replace("%}ASSISTANT:{%", "%}ASSISTANT: {%")  # "yes" would be " yes"
    row, asked = model.encode(TALKS[0]), model.encode(replace(TALKS[0], answer=None))
    assert row.ids[: len(asked)].tolist() == asked.ids.tolist()
    assert row.completion.nonzero()[0].item() == len(asked)
    assert model.processor.tokenizer.decode(row.ids[row.completion]) == "yes, two dogs on the mat.</s>"


def test_placeholders_in_the_text(model: VisionLanguageModel) -> None:
    token = model.processor.image_token
    for each in (talk(f"is {token} there?", "yes", SQUARE), talk("is it?", f"yes {token}", SQUARE)):
        with pytest.raises(UserError, match=r"2 placeholders.* images in the row: 1.*row 7") as caught:
            model.encode(each)
        assert "\n" not in str(caught.value)


def test_rows_that_are_too_long(model: VisionLanguageModel, opened: Callable[..., VisionLanguageModel]) -> None:
    length = len(model.encode(TALKS[1]))
    model.max_tokens = length
    assert len(model.encode(TALKS[1])) == length
    model.max_tokens = length - 1
    with pytest.raises(TooLongError, match=f"{length} tokens .*limit is {length - 1}.*row 7"):
        model.encode(TALKS[1])


def test_how_long_a_row_may_be(opened: Callable[..., VisionLanguageModel]) -> None:
    assert opened("llava").max_tokens == 512  # of the language model
    assert opened("llava", max_tokens=9).max_tokens == 9 and opened("llava", max_tokens=9999).max_tokens == 512
    with pytest.raises(TooLongError, match="limit is 512"):
        opened("llava").encode(talk("a cat? " * 300, "no", SQUARE))


def test_counts_are_the_models_not_only_the_processors(opened: Callable[..., VisionLanguageModel]) -> None:
    model = opened("llava")
    model.processor.vision_feature_select_strategy = "full"  # one placeholder more than the model fills
    with pytest.raises(UserError, match=r"16 embeddings of images that have 17 placeholders.*patch_size"):
        model.logps(model.collate([model.encode(TALKS[0])]))


def test_pictures_that_a_processor_refuses(opened: Callable[..., VisionLanguageModel]) -> None:
    with pytest.raises(UserError, match=r"refuses a picture of 900 x 1.*row 7, image 0"):
        opened("qwen2_vl").encode(talk("what?", "a line", tiny_vlms.picture(0, 900, 1)))


# ----------------------------------------------------------------------------------------------------
# Adapters


def adapted(model: VisionLanguageModel, **settings: Any) -> set[str]:
    """The paths of adapted layers."""
    add_lora(model.network, model.family, VlmLoraSettings(rank=2, **settings))
    layers = set(map(id, lora_layers(model.network)))
    return {name for name, module in model.network.named_modules() if id(module) in layers}


def test_lora_is_on_the_language_model_alone(model: VisionLanguageModel) -> None:
    names = adapted(model)
    assert len(names) == 2 * 7 and all(f"model.{model.family.language}.layers." in name for name in names)
    trained = {name for name, p in model.network.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(names) and all(".lora_" in name for name in trained)


def test_lora_elsewhere_when_told(model: VisionLanguageModel, opened: Callable[..., VisionLanguageModel]) -> None:
    language = f"model.{model.family.language}."
    names = adapted(model, targets="attention", projector=True, vision=True)
    assert sum(name.startswith(language) for name in names) == 2 * 4
    linear = {
        name
        for name, module in model.network.named_modules()
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name and "base_layer" not in name
    }
    left = {name for name in linear if not name.startswith(language)} - names
    # CLIP's unused pooler and the like aside, every linear layer outside the language model
    assert left <= {"lm_head"} and len(names) > 2 * 4 + 4


def test_reference_is_the_model_without_its_adapter(model: VisionLanguageModel) -> None:
    batch = model.collate(rows_of(model))
    with torch.no_grad():
        before = model.logps(batch).values
        add_lora(model.network, model.family, VlmLoraSettings(rank=2))
        assert torch.equal(model.logps(batch).values, before)  # B is 0 at the start
        for name, parameter in model.network.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.1)
        assert not torch.allclose(model.logps(batch).values, before, atol=1e-3)
        with adapters_disabled(model.network):
            assert torch.equal(model.logps(batch).values, before)
    with pytest.raises(ValueError, match="adapter already"):
        add_lora(model.network, model.family, VlmLoraSettings())


def test_a_seed_means_one_adapter(opened: Callable[..., VisionLanguageModel]) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        model, state = opened("llava"), torch.get_rng_state()
        add_lora(model.network, model.family, VlmLoraSettings(rank=2, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        return {name: p.detach() for name, p in model.network.named_parameters() if ".lora_A." in name}

    first, same, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    with pytest.raises(ValueError, match="no adapter to disable"), adapters_disabled(opened("llava").network):
        pass


# ----------------------------------------------------------------------------------------------------
# Opening


def test_what_is_opened(model: VisionLanguageModel) -> None:
    assert not model.network.training and not any(p.requires_grad for p in model.network.parameters())
    assert model.network.dtype == torch.float32 and model.network.config._attn_implementation == "sdpa"


def test_precision(opened: Callable[..., VisionLanguageModel], folders: Callable[[str], Path]) -> None:
    half = opened("llava", dtype="bf16")
    batch = half.collate(rows_of(half))
    with torch.no_grad():
        values = half.logps(batch).values
        expected = opened("llava").logps(batch).values
    assert half.network.dtype == torch.bfloat16 and values.dtype == torch.float32
    torch.testing.assert_close(values, expected, rtol=0.1, atol=0.3)
    whole = open_model(VlmModelSettings(path=str(folders("llava")), dtype="bf16"), train_full=True)
    assert whole.network.dtype == torch.float32


def test_no_code_of_a_model_is_run(
    opened: Callable[..., VisionLanguageModel],
    folders: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[Any] = []
    for auto in (transformers.AutoProcessor, transformers.AutoModelForImageTextToText):
        original = auto.from_pretrained

        def spy(*args: Any, original: Any = original, **named: Any) -> Any:
            told.append(named["trust_remote_code"])
            return original(*args, **named)

        monkeypatch.setattr(auto, "from_pretrained", spy)
    network, processor = tiny_vlms.make("llava")
    network.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    names = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor")
    config["auto_map"] = dict.fromkeys(names, "evil.Evil")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    model = open_model(VlmModelSettings(path=str(tmp_path)))
    assert type(model.network).__module__.startswith("transformers.") and told == [False, False]
    assert not (tmp_path / "ran").exists()


def broken(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of a model's folder with another configuration."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def refuses(cause: str, path: Path | str, **settings: Any) -> None:
    with pytest.raises(UserError, match=cause) as caught:
        open_model(VlmModelSettings(path=str(path), **settings))
    assert "\n" not in str(caught.value) and "model." in str(caught.value)


def test_models_that_are_none(folders: Callable[[str], Path], tmp_path: Path) -> None:
    good = folders("llava")
    refuses("no such folder", tmp_path / "gone")
    refuses("not in the local hub cache", "nobody/nothing", offline=True)
    (tmp_path / "empty").mkdir()
    refuses("no config.json", tmp_path / "empty")
    refuses("this is a file", good / "config.json")
    refuses("type bert is not supported.*llava", broken(good, tmp_path / "bert", model_type="bert"))
    refuses("placeholder is 7.*another model", broken(good, tmp_path / "tokens", image_token_index=7))
    pickled = broken(good, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refuses("only pickled weights", pickled)
    (pickled / "pytorch_model.bin").unlink()
    refuses("no weights", pickled)
    (pickled / "model.safetensors").write_bytes(b"nothing of the kind")
    refuses("cannot open the model", pickled)
    text = broken(good, tmp_path / "text")
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (text / name).unlink(missing_ok=True)
    refuses("cannot open the processor|no image processor", text)


def test_weights_that_are_missing(folders: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = broken(folders("llava"), tmp_path / "part")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(name for name in tensors if "linear_1.weight" in name))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refuses("1 weights are missing and would be random.*linear_1", folder)


def test_picture_sizes(opened: Callable[..., VisionLanguageModel], folders: Callable[[str], Path]) -> None:
    def tokens(name: str, **settings: Any) -> int:
        return opened(name, **settings).encode(talk("?", "no", SQUARE)).images[0].tokens

    assert tokens("qwen2_vl", max_pixels=16 * 16) < tokens("qwen2_vl")
    assert tokens("qwen2_vl", min_pixels=2200) > tokens("qwen2_vl")
    assert tokens("idefics3", tiles=False) == tokens("smolvlm", tiles=False) == 4 < tokens("smolvlm")
    assert tokens("smolvlm", longest_edge=96) > tokens("smolvlm")
    refuses("a llava model has no max_pixels.*none of these", folders("llava"), max_pixels=100)
    refuses("a smolvlm model has no min_pixels.*longest_edge", folders("smolvlm"), min_pixels=100)
    refuses("min_pixels 900 is above max_pixels 100", folders("qwen2_vl"), min_pixels=900, max_pixels=100)


def test_processors_that_leave_counting_to_the_model(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = broken(folders("llava"), tmp_path / "old")
    processor = json.loads((folder / "processor_config.json").read_text())
    for name in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
        processor.pop(name)
    (folder / "processor_config.json").write_text(json.dumps(processor))
    model = open_model(VlmModelSettings(path=str(folder)))
    assert model.encode(TALKS[0]).images[0].tokens == 16
    with torch.no_grad():
        assert torch.isfinite(model.logps(model.collate([model.encode(TALKS[0])])).values).all()


def test_vicuna_for_a_llava_without_a_template(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = broken(folders("llava"), tmp_path / "mute")
    (folder / "chat_template.jinja").unlink()
    model = open_model(VlmModelSettings(path=str(folder)))
    row = model.encode(TALKS[0])
    assert model.processor.tokenizer.decode(row.ids[row.completion]) == " yes, two dogs on the mat.</s>"
