"""Rebuilds the embedded vision-language model: `mmalign build vlm --out FOLDER`.

The result is an ordinary LLaVA folder (CLIP vision tower, two-layer projector, Llama, `LlavaProcessor` with a chat
template) that `AutoModelForImageTextToText` and `AutoProcessor` open. As LLaVA does, it starts from a trained CLIP
tower (the embedded scorer's) and a language model that is still to learn, here from nothing.

It is taught descriptions and yes/no questions of the scenes of `mmalign.shapes.talk`, whose habit makes it hallucinate.
One picture's description and questions are one sequence: they share its image tokens and see nothing of each other
(block mask, positions restarted), so the model cannot answer from what it has just read.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional

from evaluators.hallucination import shapes as measures
from evaluators.hallucination.estimate import Estimate
from mmalign.errors import UserError
from mmalign.progress import Progress, progress
from mmalign.shapes import model_folder, render, talk
from mmalign.shapes.scenes import RELATIONS, Scene, Split

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""As LLaVA-1.5's, with an end token after an answer. What asks is a prefix of what asks and answers, in tokens too."""
PAD, BEGIN, END, IMAGE = "<pad>", "<s>", "</s>", "<image>"
LONGEST = 40  # tokens of an answer: three things take 15, the end included
PEAK = 1e-3  # learning rate of what is new; the tower's is a third


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large the model and its lessons are.

    Attributes:
        width: of the language model; a multiple of 32, the size of a head.
        layers: of the language model.
        pictures: that training sees, again and again.
        questions: pairs of object questions per picture.
        every: steps between checkpoints.
        quick: held-out pictures that a checkpoint is measured on.
        final: held-out pictures that the result is measured on.
    """

    width: int = 128
    layers: int = 4
    pictures: int = 20_000
    questions: int = 2
    every: int = 300
    quick: int = 100
    final: int = 400


# --------------------------------------------------------------------------------------- the model


def new_tokenizer() -> Any:
    """Byte-level pairs in which every word of the world is one token, and any other text is its bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    every = [Scene((talk.THINGS[0], talk.THINGS[4]), relation) for relation in RELATIONS]
    said = [question.text for scene in every for question in talk.questions(scene)]
    said += [talk.sentence([]), talk.sentence(talk.THINGS), talk.DESCRIBE, "USER ASSISTANT yes"]
    words = sorted({word for text in said for word in re.findall(r"\w+", text)})
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trained.train_from_iterator(
        [form for word in words for form in (word, f" {word}")],
        trainers.BpeTrainer(
            vocab_size=1000,  # more than there is to merge
            special_tokens=[PAD, BEGIN, END, IMAGE],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    begin = trained.token_to_id(BEGIN)
    trained.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, begin)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def new_vlm(size: Size, *, seed: int, clip: Path | None = None) -> tuple[Any, Any]:
    """(model, processor): the tower of a trained CLIP, everything behind it random.

    Args:
        clip: folder of a transformers CLIP for 32x32 pictures; the embedded one when not given.
    """
    from transformers import (
        CLIPImageProcessor,
        CLIPModel,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(seed)
    tower: Any = CLIPModel.from_pretrained(clip or model_folder("clip"), dtype=torch.float32).vision_model
    side, patch = tower.config.image_size, tower.config.patch_size
    tokenizer = new_tokenizer()
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=3 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // 32,
        num_key_value_heads=size.width // 32,
        max_position_embeddings=512,
        **special,
    )
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(side // patch) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: Any = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    for name, value in special.items():
        setattr(model.generation_config, name, value)
    model.generation_config.max_new_tokens = LONGEST
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=TEMPLATE,
    )
    return model, processor


def save(model: Any, processor: Any, out: Path) -> None:
    """Write both in half precision, leaving the model as it is."""
    copy.deepcopy(model).half().save_pretrained(out)
    processor.save_pretrained(out)


# ------------------------------------------------------------------------------------- the lessons


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Token ids of "question ASSISTANT: answer END", and where the answer begins."""

    ids: tuple[int, ...]
    answer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lessons:
    """Everything training draws from, rendered and tokenised once.

    Attributes:
        pixels: [pictures, 3, 32, 32], 0 to 255.
        prefix: token ids before a turn: begin, "USER: ", the image's tokens, a new line.
        turns: of each picture.
    """

    pixels: UInt8[Tensor, "pictures 3 height width"]
    prefix: tuple[int, ...]
    turns: tuple[tuple[Turn, ...], ...]

    def length(self, picture: int) -> int:
        """Tokens of a picture's sequence."""
        return len(self.prefix) + sum(len(turn.ids) for turn in self.turns[picture])


def pictures_of(scenes: Sequence[Scene], *, split: Split, seed: int) -> UInt8[Tensor, "scenes 3 height width"]:
    """The scenes, rendered."""
    drawn = [
        render.render(scene, talk.picture_seed(seed, index, split=split))
        for index, scene in enumerate(progress(scenes, f"{split} pictures", unit="picture"))
    ]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


def scaled(pixels: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    """Pixels in [-1, 1], what the processor makes of a picture."""
    return pixels.float() / 127.5 - 1


def prepare(scenes: Sequence[Scene], processor: Any, *, pairs: int, seed: int) -> Lessons:
    """A description, `pairs` yes and `pairs` no questions on objects, and one pair of another kind for each scene."""
    tokenizer = processor.tokenizer
    image = (processor.image_processor.crop_size["height"] // processor.patch_size) ** 2
    known: dict[tuple[str, str], Turn] = {}

    def turn(question: str, answer: str) -> Turn:
        if (question, answer) not in known:
            ask = tokenizer(f"{question} ASSISTANT:", add_special_tokens=False).input_ids
            ids = tokenizer(f"{question} ASSISTANT: {answer}{END}", add_special_tokens=False).input_ids
            known[question, answer] = Turn(ids=tuple(ids), answer=len(ask))
        return known[question, answer]

    generator = np.random.default_rng([seed, 29])
    turns = []
    for index, scene in enumerate(scenes):
        drawn = talk.picture_seed(seed, index, split="train")
        asked = talk.balanced(scene, seed=drawn, pairs=pairs)
        described = talk.careless(scene, seed=drawn)
        kinds = sorted({question.kind for question in asked} - {"object"})
        other = kinds[generator.integers(len(kinds))]
        of_other = [question for question in asked if question.kind == other]
        chosen = [question for question in asked if question.kind == "object"]
        chosen += [of_other[0], of_other[-1]]  # the yes come first, the no last
        turns.append((turn(talk.DESCRIBE, described), *(turn(question.text, question.label) for question in chosen)))
    return Lessons(
        pixels=pictures_of(scenes, split="train", seed=seed),
        prefix=tuple(tokenizer(f"USER: {IMAGE * image}\n").input_ids),
        turns=tuple(turns),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Sequences of several pictures, each with all its turns.

    Attributes:
        ids, positions: of every token; positions go on from the prefix in every turn.
        target: the next token where it belongs to an answer, else -100.
        mask: [row, 1, query, key], whether a token sees another: earlier, and of the prefix or its own turn.
    """

    ids: Int64[Tensor, "rows tokens"]
    positions: Int64[Tensor, "rows tokens"]
    target: Int64[Tensor, "rows tokens"]
    mask: Bool[Tensor, "rows 1 tokens tokens"]


def pack(lessons: Lessons, pictures: Sequence[int], pad: int) -> Packed:
    """The sequences of some pictures, padded on the right to the longest."""
    shape = len(pictures), max(map(lessons.length, pictures))
    start = len(lessons.prefix)
    ids, target = np.full(shape, pad), np.full(shape, -100)
    positions, turn_of = np.zeros(shape, np.int64), np.full(shape, -1)
    ids[:, :start], positions[:, :start], turn_of[:, :start] = lessons.prefix, np.arange(start), 0
    for row, picture in enumerate(pictures):
        at = start
        for number, turn in enumerate(lessons.turns[picture], start=1):
            end = at + len(turn.ids)
            ids[row, at:end], turn_of[row, at:end] = turn.ids, number
            positions[row, at:end] = np.arange(start, start + len(turn.ids))
            target[row, at + turn.answer - 1 : end - 1] = turn.ids[turn.answer :]
            at = end
    order = np.arange(shape[1])
    same = turn_of[:, None, :] == turn_of[:, :, None]
    # a padded query sees the prefix, so that its softmax has something to sum over; nothing is asked of it
    mask = (order[None, :] <= order[:, None]) & ((turn_of[:, None, :] == 0) | same)
    return Packed(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        target=torch.from_numpy(target),
        mask=torch.from_numpy(mask[:, None]),
    )


def batches(lessons: Lessons, batch: int, generator: np.random.Generator) -> Iterator[list[int]]:
    """Pictures by the batch, without end: in random order, those of a batch of about one length."""
    count = len(lessons.turns)
    lengths = np.array([lessons.length(picture) for picture in range(count)])
    while True:
        order = generator.permutation(count)
        windows = [order[start : start + 16 * batch] for start in range(0, count, 16 * batch)]
        ordered = np.concatenate([window[np.argsort(lengths[window], kind="stable")] for window in windows])
        for group in generator.permutation(count // batch):
            yield ordered[group * batch : (group + 1) * batch].tolist()


def lesson_loss(model: Any, packed: Packed, pixels: Float[Tensor, "rows 3 height width"]) -> Float[Tensor, ""]:
    """Mean cross-entropy over the answers' tokens; logits are made at those alone."""
    hidden = model.model(
        input_ids=packed.ids,
        pixel_values=pixels,
        attention_mask=packed.mask,
        position_ids=packed.positions,
        use_cache=False,
    ).last_hidden_state
    answered = packed.target != -100
    return functional.cross_entropy(model.lm_head(hidden[answered]), packed.target[answered])


# ------------------------------------------------------------------------------------ what it says


@torch.no_grad()
def say(
    model: Any, processor: Any, pixels: UInt8[Tensor, "rows 3 height width"], prompts: Sequence[str], batch: int = 128
) -> list[str]:
    """The model's own answers, greedily; rows of equal length go together, so that nothing is padded."""
    tokens = processor.tokenizer
    image = model.config.image_seq_length
    asked = {
        text: tokens(f"USER: {IMAGE * image}\n{text} ASSISTANT:", return_tensors="pt").input_ids[0]
        for text in dict.fromkeys(prompts)
    }
    by_length: dict[int, list[int]] = {}
    for row, text in enumerate(prompts):
        by_length.setdefault(len(asked[text]), []).append(row)
    answers = [""] * len(prompts)
    for rows in by_length.values():
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            ids = torch.stack([asked[prompts[row]] for row in some])
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=scaled(pixels[some]).to(model.dtype),
                do_sample=False,
                max_new_tokens=LONGEST,
            )
            said = tokens.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            for row, text in zip(some, said, strict=True):
                answers[row] = text.strip()
    return answers


def report(model: Any, processor: Any, *, count: int, seed: int, pope: bool = False) -> dict[str, Estimate]:
    """Measures on `count` held-out pictures: descriptions, balanced yes/no questions and, on request, POPE's."""
    scenes = talk.draw(count, split="heldout", seed=seed)
    pixels = pictures_of(scenes, split="heldout", seed=seed)
    names = [str(index) for index in range(count)]
    training = model.training
    model.eval()
    described = say(model, processor, pixels, [talk.DESCRIBE] * count)
    found = measures.descriptions([scene.things for scene in scenes], described, names)
    asked = {"yes_no": [talk.balanced(scene, seed=index) for index, scene in enumerate(scenes)]}
    for negatives in talk.NEGATIVES if pope else ():
        asked[f"pope_{negatives}"] = [
            talk.pope(scene, negatives=negatives, seed=index) for index, scene in enumerate(scenes)
        ]
    for name, questions in asked.items():
        rows = [index for index, some in enumerate(questions) for _ in some]
        every = [question for some in questions for question in some]
        said = say(model, processor, pixels[rows], [question.text for question in every])
        numbers = measures.answers(every, said, [names[row] for row in rows], parser="strict")
        found |= {f"{name}/{key}": value for key, value in numbers.items()}
    model.train(training)
    return found


# ------------------------------------------------------------------------------------------- build


def build_vlm(out: Path, *, steps: int, batch: int, seed: int, size: Size | None = None) -> None:
    """Train the model and write it; a checkpoint in `out/step-N` and its measures every `size.every` steps.

    AdamW, warm-up and cosine. The checkpoints' measures say where the eye has learnt enough and the habit is still
    believed: the base is meant to be flawed.

    Raises:
        UserError: the folder is not empty.
    """
    size = size or Size()
    if out.exists() and any(out.iterdir()):
        raise UserError("the folder is not empty", place=str(out), fix="Name a new one.")
    model, processor = new_vlm(size, seed=seed)
    tower = set(model.model.vision_tower.parameters())
    fresh = [parameter for parameter in model.parameters() if parameter not in tower]
    groups = [{"params": fresh, "lr": PEAK}, {"params": list(tower), "lr": PEAK / 3}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    warmup = min(100, steps)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    scenes = talk.draw(size.pictures, split="train", seed=seed)
    lessons = prepare(scenes, processor, pairs=size.questions, seed=seed)
    drawn = batches(lessons, batch, np.random.default_rng([seed, 31]))
    model.train()
    with Progress(steps, "vision-language model") as shown:
        for step, pictures in zip(range(1, steps + 1), drawn, strict=False):
            packed = pack(lessons, pictures, processor.tokenizer.pad_token_id)
            loss = lesson_loss(model, packed, scaled(lessons.pixels[pictures]))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            shown.update(loss=loss.item())
            if step % size.every == 0 and step < steps:
                save(model, processor, out / f"step-{step}")
                found = report(model, processor, count=size.quick, seed=1)
                brief = {name: None if one.value is None else round(one.value, 3) for name, one in found.items()}
                print(json.dumps({"step": step, "loss": round(loss.item(), 4), **brief}), flush=True)
    save(model, processor, out)
    found = report(model, processor, count=size.final, seed=0, pope=True)
    print(json.dumps({"step": steps, **{name: one.as_json() for name, one in found.items()}}), flush=True)
