"""POVID, stage 1: the true answer wins over itself with hallucinations put into it.

By rules that follow the habits of the data (`vlm.injection`), or by a model that is asked for mistakes. As many answers
of yes are kept as of no.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from pydantic import Field

from mmalign.config import NamedSection
from mmalign.progress import progress
from mmalign.randomness import key_seed
from mmalign.records import Candidate, Record
from vlm.annotators import Request, ask, open_annotator
from vlm.examples import Example, SourceSettings, evened, is_false, read_examples, true_answers
from vlm.injection import CoOccurrence, Injector, SaidTruth, SceneTruth, injection_prompt
from vlm.models import VisionLanguageModel
from vlm.wording import SHAPES_WORLD, Vocabulary, english, learn_nouns

NAME = "injected"


class Options(SourceSettings):
    """What is injected, and by whom."""

    edits: int = Field(1, gt=0, description="false things, colours, numbers and places per answer")
    additions: float = Field(
        0.25,
        ge=0,
        le=0.5,
        description="share of the answers listing things that get one more; as many lose one, so lengths stay equal",
    )
    habits: str | None = Field(
        None, description="source whose true answers say which things come together; null: the data's own"
    )
    annotator: NamedSection | None = Field(None, description="endpoint or local: who writes mistakes; null: rules")


def records(options: Options, model: Callable[[], VisionLanguageModel]) -> Iterator[Record]:
    """A record for each answer in which something could be made false."""
    examples = read_examples(options)
    made = _by_rules(options, examples) if options.annotator is None else _by_model(options, examples, model)
    kept = evened(list(made))
    yield from kept
    left = len(examples) - len(kept)
    print(f"mmalign: {len(kept)} answers have hallucinations injected, {left} are left out", file=sys.stderr)


def vocabulary_of(examples: list[Example]) -> Vocabulary:
    """The shapes world's where every picture is of it, else English with the nouns of the answers."""
    if all(example.scene is not None for example in examples):
        return SHAPES_WORLD
    return english(learn_nouns(example.answer for example in examples))


def _by_rules(options: Options, examples: list[Example]) -> Iterator[Record]:
    vocabulary = vocabulary_of(examples)
    answers = [example.answer for example in examples] if options.habits is None else true_answers(options.habits)
    injector = Injector(CoOccurrence.learn(vocabulary, answers), edits=options.edits, additions=options.additions)
    for example in progress(examples, "inject", unit="answer"):
        truth = SaidTruth(example.truths, vocabulary) if example.scene is None else SceneTruth(example.scene)
        made = injector.rewrite(example.answer, truth, seed=key_seed(NAME, options.seed, example.key))
        if made is not None:
            about = {"by": "rules", "edits": [edit.as_json() for edit in made.edits]}
            yield example.pair(Candidate(candidate_id="rejected", text=made.text), by=NAME, made=about)


def _by_model(options: Options, examples: list[Example], model: Callable[[], VisionLanguageModel]) -> Iterator[Record]:
    assert options.annotator is not None
    annotator, cache = open_annotator(options.annotator, model, place="make.annotator")
    prompts = [injection_prompt(example.prompt, example.answer, options.edits) for example in examples]
    asked = [Request(prompt=prompt, images=one.media) for prompt, one in zip(prompts, examples, strict=True)]
    replies = ask(annotator, asked, cache, title="inject")
    for example, prompt, reply in zip(examples, prompts, replies, strict=True):
        if is_false(example, reply):
            rejected = Candidate(candidate_id="rejected", text=reply, model=annotator.identity)
            yield example.pair(rejected, by=NAME, made={"by": annotator.identity, "prompt": prompt})
