"""Measure the pitfalls of a model on generated pictures, on all ranks."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from clip_train.data.scenes.vocabulary import TEMPLATES
from clip_train.evaluation.choose.choices import Choice
from clip_train.evaluation.choose.evaluator import compare, first_picture_answers
from clip_train.evaluation.collapse import collapsed_tower
from clip_train.evaluation.evaluator import Evaluator, Setting
from clip_train.evaluation.features import (
    DualEncoder,
    TokenizedTexts,
    encode_all_images,
    encode_texts,
    to_numpy,
    tokenize_texts,
)
from clip_train.evaluation.prompts.classifier import ClassPrompts, build_classifier, tokenize_prompts
from clip_train.evaluation.result import EvaluationResult, evenly_spaced
from clip_train.evaluation.samples import PictureAnswers, ReportSamples, read_pictures
from clip_train.evaluation.scorecard.cards import COMBINATIONS, compose_cards
from clip_train.evaluation.scorecard.pictures import SketchImages
from clip_train.evaluation.scorecard.score import CARDS, CardScore, score_cards
from clip_train.evaluation.scorecard.verdict import judge, judge_control

PICTURES_PER_CARD = 4
NUM_TOP = 5


class Scorecard(Evaluator):
    """Six pitfalls and a control, each with its chance level and a verdict relative to the control.

    Args:
        num_items: of each card, a multiple of 24.
        setting: what it works with.
    """

    def __init__(self, num_items: int, *, setting: Setting) -> None:
        super().__init__(setting)
        self.cards = compose_cards(num_items)
        self.source = SketchImages(self.cards.sketches, image_size=setting.image_size)

    def metric_names(self) -> list[str]:
        """Return the names of the cards."""
        return list(CARDS)

    def measure(self, model: DualEncoder) -> EvaluationResult:
        """Return the score of each card, its verdict, and the scores of its parts."""
        batches = self.setting.read(self.source)
        images = encode_all_images(model, batches, num_images=len(self.source), world=self.world)
        texts = encode_texts(model, self._texts, world=self.world)
        class_cosines = to_numpy(build_classifier(model, self._prompts, world=self.world).cosines(images))  # [P, 24]
        caption_cosines = compare(self._choices, images=images, texts=texts)
        scores = score_cards(self.cards, class_cosines=class_cosines, caption_cosines=caption_cosines)
        result = _result(scores, num_items=len(self.cards.control))
        result.collapsed = collapsed_tower(image=images, text=texts.features)
        if result.collapsed:
            result.verdicts, result.notes = {}, []
        result.predictions = {
            "class_cosine": class_cosines,
            "caption_cosine": np.concatenate([cosine.ravel() for cosine in caption_cosines]),
            **{f"right_{card.name}": card.right for card in scores if card.right is not None},
        }
        return result

    def samples(self, result: EvaluationResult, *, size: int) -> ReportSamples:
        """Return evenly spaced pictures of every card but the foreign ones, with the model's answers."""
        shown: list[tuple[int, PictureAnswers]] = []
        class_cosines = result.predictions["class_cosine"]
        for i in evenly_spaced(len(self.cards.control), count=PICTURES_PER_CARD):
            one = self.cards.control[i]
            shown.append((one.picture, _class_answers(COMBINATIONS[one.label].class_name, class_cosines[one.picture])))
        starts = np.cumsum([0, *(len(item.captions) for item in self._choices)])
        first = 0
        for items in self.cards.choices.values():
            for i in first + evenly_spaced(len(items), count=PICTURES_PER_CARD):
                item, cosine = self._choices[i], result.predictions["caption_cosine"][starts[i] : starts[i + 1]]
                right = (0, int(cosine.argmax())) in item.right
                shown.append((item.pictures[0], first_picture_answers(item, cosine, right=right)))
            first += len(items)
        for i in evenly_spaced(len(self.cards.written_on), count=PICTURES_PER_CARD):
            shape = self.cards.written_on[i]
            truth = f"{shape.colour} {shape.shape}"
            shown.append((shape.attacked, _class_answers(truth, class_cosines[shape.attacked])))
        pictures = read_pictures(self.source, np.array([picture for picture, _ in shown]), size=size)
        return ReportSamples(pictures=pictures, answers=[answer for _, answer in shown])

    @cached_property
    def _choices(self) -> list[Choice]:
        return [item for items in self.cards.choices.values() for item in items]

    @cached_property
    def _texts(self) -> TokenizedTexts:
        return tokenize_texts(self.setting.tokenizer, [text for item in self._choices for text in item.captions])

    @cached_property
    def _prompts(self) -> ClassPrompts:
        names = [combination.class_name for combination in COMBINATIONS]
        return tokenize_prompts(self.setting.tokenizer, classnames=names, templates=TEMPLATES)


def _result(scores: list[CardScore], *, num_items: int) -> EvaluationResult:
    """Return the cards' scores as metrics of one evaluation."""
    control = scores[0].measured
    verdicts = {scores[0].name: judge_control(control)}
    verdicts |= {card.name: judge(card.measured, control=control, own=card.control) for card in scores[1:]}
    return EvaluationResult(
        task="pitfall_scorecard",
        num_items=num_items,
        metrics={card.name: card.measured.score for card in scores},
        chance={card.name: card.measured.chance for card in scores},
        intervals={card.name: card.measured.interval for card in scores},
        verdicts=verdicts,
        parts={f"{card.name}/{tag}": part for card in scores for tag, part in card.parts.items()},
        notes=[f"{card.name}: {card.note}" for card in scores if card.note],
    )


def _class_answers(truth: str, cosines: np.ndarray) -> PictureAnswers:
    top = np.argsort(-cosines, kind="stable")[:NUM_TOP]
    answers = [COMBINATIONS[c].class_name for c in top]
    return PictureAnswers(
        truth=[truth],
        answers=answers,
        cosines=[round(float(cosines[c]), 4) for c in top],
        right=answers[0] == truth,
    )
