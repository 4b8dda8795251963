"""A small made-up atlas: facts, questions about them, scripted answers of known faults, and a word-level tokenizer.

It is a world small enough for a language model of a few hundred thousand parameters to learn from random weights.
All text is lower-case words and punctuation separated by single spaces, so `text.split()` gives the tokens.
The gold judge of answers is `dvpo.data.atlas_score`; it shares no code with this module.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from dvpo.data import atlas_text as words
from dvpo.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")

MOST_ASKED = 3
"""The most attributes one question asks for."""
MOST_EXTRA = 2
"""The most statements that repeat something, and the most that are beside the point, in one answer."""
MOST_STATED = 4
"""The most statements in one answer; extras beyond that are left out."""


@dataclass(frozen=True)
class Question:
    """A question's text, the place it is about and the attributes it asks for, in the order asked."""

    text: str
    place: str
    attributes: tuple[str, ...]


@dataclass(frozen=True)
class Style:
    """How a scripted policy answers: the probability of each fault and habit.

    `wrong_value`, `wrong_place` and `omit` are drawn for each asked attribute (at least one is always answered);
    `repeat` and `beside` are each drawn up to `MOST_EXTRA` times per answer; `opener`, `closer`, `curt` and `shuffle`
    once per answer; `hedge` for each statement not curt.
    """

    wrong_value: float = 0.0
    wrong_place: float = 0.0
    omit: float = 0.0
    repeat: float = 0.0
    beside: float = 0.0
    opener: float = 0.0
    closer: float = 0.0
    curt: float = 0.0
    hedge: float = 0.0
    shuffle: float = 0.25


POLICIES: dict[str, Style] = {
    "scholar": Style(wrong_value=0.03, omit=0.02, beside=0.06, opener=0.35, closer=0.35, hedge=0.05),
    "clerk": Style(wrong_value=0.08, wrong_place=0.02, omit=0.05, repeat=0.05, closer=0.2, curt=0.5),
    "rambler": Style(wrong_value=0.15, wrong_place=0.05, repeat=0.1, beside=0.5, opener=0.4, closer=0.3, hedge=0.25),
    "guesser": Style(wrong_value=0.65, wrong_place=0.07, omit=0.08, opener=0.3, closer=0.2, curt=0.15, hedge=0.35),
    "hasty": Style(wrong_value=0.25, wrong_place=0.05, omit=0.4, closer=0.05, curt=0.25, shuffle=0.5),
    "parrot": Style(wrong_value=0.12, wrong_place=0.25, omit=0.05, repeat=0.5, opener=0.3, curt=0.15),
}
"""Scripted policies, from careful to careless. Their lengths are set so that length says little about quality."""


@dataclass(frozen=True)
class _Claim:
    """What one statement says, before it is put into words."""

    place: str
    attribute: str
    value: str


@dataclass
class Atlas:
    """Places, the values each attribute can take, and the true value of each attribute of each place."""

    places: list[str]
    attributes: dict[str, list[str]]
    facts: dict[str, dict[str, str]]

    @classmethod
    def build(cls, seed: int, places: int = 48) -> "Atlas":
        """Draw place names and facts from `seed`."""
        names = [start + end for start in words.NAME_STARTS for end in words.NAME_ENDS]
        if not 2 <= places <= len(names):
            raise InputError(f"an atlas of {places} places cannot be built: choose from 2 to {len(names)} places")
        rng = random.Random(seed)
        chosen = rng.sample(names, places)
        attributes = {attribute: list(values) for attribute, values in words.VALUES.items()}
        facts = {place: {name: rng.choice(values) for name, values in attributes.items()} for place in chosen}
        return cls(chosen, attributes, facts)

    def to_json(self) -> dict[str, Any]:
        """The atlas as a plain dict with the keys places, attributes and facts."""
        return {
            "places": list(self.places),
            "attributes": {name: list(values) for name, values in self.attributes.items()},
            "facts": {place: dict(known) for place, known in self.facts.items()},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Atlas":
        """The atlas that `to_json` gave as `data`."""
        try:
            atlas = cls(
                [str(place) for place in data["places"]],
                {str(name): [str(value) for value in values] for name, values in data["attributes"].items()},
                {
                    place: {name: str(data["facts"][place][name]) for name in data["attributes"]}
                    for place in data["places"]
                },
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"the atlas is not readable ({error!r}): write it with Atlas.to_json") from error
        # The sentence patterns are written for these attributes only.
        if set(atlas.attributes) != set(words.ATTRIBUTES):
            raise InputError(f"the atlas must have exactly the attributes {', '.join(words.ATTRIBUTES)}")
        return atlas

    def questions(self, seed: int, n: int) -> list[Question]:
        """`n` questions with different texts; one, two and three attributes are asked about equally often.

        When there are too few different questions on one attribute for an equal share, longer ones make up for them.
        """
        sizes = [self._question_count(asked) for asked in range(1, MOST_ASKED + 1)]
        if n < 0 or n > sum(sizes):
            raise InputError(f"{n} questions cannot be made from this atlas: ask for 0 to {sum(sizes)}")
        rng = random.Random(seed)
        made: list[Question] = []
        # Sizes grow with the number of attributes, so what one share cannot hold goes to the later ones.
        for position, size in enumerate(sizes):
            share = min(size, -(-(n - len(made)) // (len(sizes) - position)))
            made += [self._question(position + 1, code) for code in rng.sample(range(size), share)]
        rng.shuffle(made)
        return made

    def answer(self, question: Question, style: Style, rng: random.Random) -> str:
        """An answer to `question` in `style`, one or more statements with optional courtesies around them."""
        asked = [attribute for attribute in question.attributes if rng.random() >= style.omit]
        if not asked:
            asked = [rng.choice(question.attributes)]
        if rng.random() < style.shuffle:
            rng.shuffle(asked)
        curt = rng.random() < style.curt
        claims = [self._claim(question.place, attribute, style, rng) for attribute in asked]
        sentences = [self._say(claim, question.place, curt, style, rng) for claim in claims]
        room = MOST_STATED - len(claims)
        for attribute in _extras(style.beside, _others(question.attributes), room, rng):
            claim = _Claim(question.place, attribute, self.facts[question.place][attribute])
            sentences.append(_prefix(words.ADDING, self._say(claim, question.place, curt, style, rng), curt))
        for claim in _extras(style.repeat, claims, MOST_STATED - len(sentences), rng):
            sentences.append(_prefix(words.REPEATING, self._say(claim, question.place, curt, style, rng), curt))
        if rng.random() < style.opener:
            sentences.insert(0, rng.choice(words.OPENERS))
        if rng.random() < style.closer:
            sentences.append(rng.choice(words.CLOSERS))
        return " ".join(sentences)

    def lessons(self, seed: int, n: int) -> list[str]:
        """`n` documents: a place, a statement, and a reader's remark that it is right or wrong.

        Half of them are wrong: a false value, or a statement on another place. One in five has a question on the place
        before the statement, as a conversation has: without these, whether the judgement carries over to conversations
        is luck.
        """
        rng, style = random.Random(seed), Style(wrong_value=0.25, wrong_place=0.25, hedge=0.1)
        documents = []
        for _ in range(n):
            place, attribute = rng.choice(self.places), rng.choice(words.ATTRIBUTES)
            claim = self._claim(place, attribute, style, rng)
            if claim.place != place:
                verdict = "wrong place"
            else:
                verdict = "right" if claim.value == self.facts[place][attribute] else "wrong value"
            said = self._say(claim, place, rng.random() < 0.1, style, rng)
            opening = words.TOPIC.format(p=place)
            if rng.random() < 0.2:
                core = rng.choice(words.QUESTION_CORES).format(p=place, l=attribute, be="is")
                opening = f"{words.USER} {core} {words.EOS} {words.ASSISTANT}"
            documents.append(f"{opening} {said} {words.REMARKS[verdict]}")
        return documents

    def partial_answers(self, seed: int, questions: Sequence[Question]) -> list[str]:
        """A true answer to each question that leaves out each asked attribute with probability 0.4 (never all)."""
        rng, style = random.Random(seed), Style(omit=0.4, beside=0.1, curt=0.6, hedge=0.1)
        return [self.answer(question, style, rng) for question in questions]

    def _question_count(self, asked: int) -> int:
        patterns = len(words.QUESTION_OPENERS) * len(words.QUESTION_CORES) * len(words.QUESTION_CLOSERS)
        return patterns * len(self.places) * math.perm(len(words.ATTRIBUTES), asked)

    def _question(self, asked: int, code: int) -> Question:
        """The question number `code` of those that ask for `asked` attributes."""
        code, opener = divmod(code, len(words.QUESTION_OPENERS))
        code, core = divmod(code, len(words.QUESTION_CORES))
        code, closer = divmod(code, len(words.QUESTION_CLOSERS))
        code, place = divmod(code, len(self.places))
        left, attributes = list(words.ATTRIBUTES), []
        for _ in range(asked):
            code, pick = divmod(code, len(left))
            attributes.append(left.pop(pick))
        listed = " , ".join(attributes[:-1]) + " and " + attributes[-1] if asked > 1 else attributes[0]
        body = words.QUESTION_CORES[core].format(p=self.places[place], l=listed, be="is" if asked == 1 else "are")
        parts = (words.QUESTION_OPENERS[opener], body, words.QUESTION_CLOSERS[closer])
        return Question(" ".join(part for part in parts if part), self.places[place], tuple(attributes))

    def _claim(self, place: str, attribute: str, style: Style, rng: random.Random) -> _Claim:
        """What a policy says on one asked attribute: the truth, another place's fact, or a false value."""
        draw = rng.random()
        if draw < style.wrong_place:
            other = rng.choice([name for name in self.places if name != place])
            return _Claim(other, attribute, self.facts[other][attribute])
        true = self.facts[place][attribute]
        if draw < style.wrong_place + style.wrong_value:
            return _Claim(place, attribute, rng.choice([v for v in self.attributes[attribute] if v != true]))
        return _Claim(place, attribute, true)

    def _say(self, claim: _Claim, implied: str, curt: bool, style: Style, rng: random.Random) -> str:
        """The claim in words; a curt statement names its place only when it is not the `implied` one."""
        if curt:
            form = words.CURT_FORM if claim.place == implied else words.CURT_FORM_WITH_PLACE
            return form.format(a=claim.attribute, p=claim.place, v=claim.value)
        form = rng.choice(words.PLAIN_FORMS)
        # Only values that are things take "the".
        value = f"the {claim.value}" if claim.attribute in words.TAKES_ARTICLE else claim.value
        sentence = form.format(a=claim.attribute, p=claim.place, v=value)
        return f"{rng.choice(words.HEDGES)} {sentence}" if rng.random() < style.hedge else sentence


def build_tokenizer(atlas: Atlas) -> "PreTrainedTokenizerFast":
    """A tokenizer with one id per word of the atlas, a chat template, and padding that is not the end of text."""
    # Imported here because they are slow to load and only this function needs them.
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    known = words.common_words() | set(atlas.places) | set(atlas.attributes)
    known.update(value for values in atlas.attributes.values() for value in values)
    vocabulary = {word: number for number, word in enumerate([*words.SPECIAL_TOKENS, *sorted(known)])}
    core = Tokenizer(WordLevel(vocabulary, unk_token=words.UNK))
    core.pre_tokenizer = WhitespaceSplit()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in words.SPECIAL_TOKENS])
    # Its constructor has no type hints of its own.
    make: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast
    return make(
        tokenizer_object=core,
        pad_token=words.PAD,
        unk_token=words.UNK,
        eos_token=words.EOS,
        additional_special_tokens=[words.USER, words.ASSISTANT, words.SYSTEM],
        chat_template=words.CHAT_TEMPLATE,
        padding_side="right",
        model_max_length=512,
        # Clean-up would join punctuation to the word before it.
        clean_up_tokenization_spaces=False,
    )


def _others(attributes: Sequence[str]) -> list[str]:
    return [attribute for attribute in words.ATTRIBUTES if attribute not in attributes]


def _prefix(opening: str, sentence: str, curt: bool) -> str:
    """The sentence after an opening such as "also ,"; curt statements go without."""
    return sentence if curt else f"{opening} {sentence}"


def _extras(chance: float, pool: Sequence[T], room: int, rng: random.Random) -> list[T]:
    """At most `room` and `MOST_EXTRA` different members of `pool`, each slot filled with probability `chance`."""
    count = sum(rng.random() < chance for _ in range(MOST_EXTRA))
    return rng.sample(pool, min(count, room, len(pool)))
