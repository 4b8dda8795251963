"""The gold judge of answers about the made-up atlas: reads an answer word by word and says what is wrong, and where.

It is written independently of the generator in `dvpo.data.atlas`: it knows the facts as a plain dict and reads text by
a grammar of its own, more lenient than what the generator writes. It never fails on an answer, whatever its words.
"""

import re
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from dvpo.errors import InputError

Verdict = Literal["right", "wrong value", "wrong place", "beside", "repeat"]

SAID_NOTHING = -0.5
REPEAT_COST = 0.1
BESIDE_COST = 0.1
WRONG_UNASKED_COST = 0.25
GARBLED_COST = 0.1
POLITE_BONUS = 0.05


@dataclass(frozen=True)
class Statement:
    """A statement found in an answer: its words are `answer.split()[start:end]`."""

    start: int
    end: int
    place: str
    attribute: str
    value: str
    verdict: Verdict


@dataclass(frozen=True)
class Judgement:
    """The verdict on an answer.

    `wrong_words` are the indices in `answer.split()` of the words that make a statement wrong: the value of a wrong
    value, the place named by a statement about another place. `missing` are the asked attributes with no right and no
    wrong statement. `garbled` counts the words in no statement and no courtesy phrase.
    """

    score: float
    statements: tuple[Statement, ...]
    wrong_words: tuple[int, ...]
    missing: tuple[str, ...]
    polite: bool
    garbled: int


@dataclass(frozen=True)
class _Found:
    """A statement as read: word span and the words that fill it; no place where it leaves the place out."""

    start: int
    end: int
    place_at: int | None
    value_at: int
    attribute: str
    refers_back: bool


# The grammar is over coded text: P is any place, A any attribute, V any value, ? a word no grammar has; other words
# stand for themselves. A place where a value belongs is read as a (wrong) value.
_LEAD = r"(?:(?:also|again|and|but|surely|i think|i believe)(?: ,)? )*"
_P = r"(?P<p>P)"
_A = r"(?P<a>A)"
_V = r"(?:(?:the|a|an) )?(?P<v>[VP])"
_END = r"(?: [.,])?(?= |$)"

_NAMING = (
    rf"(?:the |(?P<its>its ))?{_A}(?: (?:you find )?(?:of|in|for) {_P})? (?:is|:) {_V}",
    rf"(?:in|of|for|about) {_P}(?: [,:])? (?:(?:the|its) )?{_A} (?:is|:) {_V}",
    rf"{_P} has {_V} (?:as|for) (?:its|the|an?) {_A}",
    rf"{_V} is (?:the|an?) {_A} (?:you find )?(?:of|in|for) {_P}",
)
_VERBS = {
    "river": (rf"{_P} lies on {_V}", rf"{_V} flows (?:through|in) {_P}"),
    "climate": (rf"the weather (?:in|of) {_P} is {_V}", rf"{_P} is {_V} place"),
    "export": (rf"{_P} sells {_V}", rf"traders buy {_V} in {_P}"),
    "language": (rf"people in {_P} speak {_V}", rf"{_V} is spoken in {_P}"),
    "ruler": (rf"{_V} rules {_P}", rf"{_P} is ruled by {_V}"),
    "landmark": (rf"visitors to {_P} see {_V}", rf"{_V} stands in {_P}"),
}
_COURTESY = re.compile(
    r"(?:thank you(?: for asking)?|good question|hello|i am glad to help|i hope that helps|have a nice day"
    rf"|please ask(?: me)?(?: again)?|you are welcome){_END}"
)
_TOPIC = re.compile(rf"about {_P}(?: [:.,])?(?= |$)")
_PLAIN_WORD = re.compile(r"[a-z]+|[.,:?]")


class Judge:
    """Judges answers against the facts of one atlas, given as the dict that `Atlas.to_json` returns.

    Verdicts: a statement about another place than the asked one is "wrong place", true or not; about the asked place,
    a false value (also one that belongs to another attribute) is "wrong value"; a true one is "beside" if it was not
    asked for, "right" the first time and "repeat" after that.

    Score: the mean over the asked attributes of +1 (stated right, with no wrong statement on it), -1 (any wrong
    statement on it) or 0 (missing); minus 0.1 for each repeat, 0.1 for each statement beside the point, 0.25 for each
    wrong statement on an attribute not asked for and 0.1 for each unbroken run of garbled words; plus 0.05 if the
    answer is polite and has a right statement; clipped to [-1, 1]. An answer with no statement at all has -0.5 in
    place of the mean, so that saying nothing is worse than missing a part. Length has no other part in it.
    """

    def __init__(self, world: dict[str, Any]) -> None:
        self._facts: dict[str, dict[str, str]] = world["facts"]
        self._codes: dict[str, str] = {}
        for values in world["attributes"].values():
            self._codes.update(dict.fromkeys(values, "V"))
        self._codes.update(dict.fromkeys(world["attributes"], "A"))
        self._codes.update(dict.fromkeys(world["places"], "P"))
        forms: list[tuple[str | None, str]] = [(None, form) for form in _NAMING]
        forms += [(name, form) for name in world["attributes"] for form in _VERBS.get(name, ())]
        self._forms = [(name, re.compile(_LEAD + form + _END)) for name, form in forms]

    def judge(self, question_text: str, answer_text: str) -> Judgement:
        """Judge one answer; a question that names no single place or no attribute is an InputError."""
        place, asked = self._read_question(question_text)
        words = answer_text.split()
        found, polite, garbled = self._read_answer(words, place)
        statements: list[Statement] = []
        wrong_words: set[int] = set()
        right: set[str] = set()
        wrong: set[str] = set()
        for item, about, about_at in found:
            value = words[item.value_at]
            verdict: Verdict
            if about != place:
                verdict = "wrong place"
                wrong.add(item.attribute)
                wrong_words.add(about_at)
            elif value != self._facts[place][item.attribute]:
                verdict = "wrong value"
                wrong.add(item.attribute)
                wrong_words.add(item.value_at)
            elif item.attribute not in asked:
                verdict = "beside"
            else:
                verdict = "repeat" if item.attribute in right else "right"
                right.add(item.attribute)
            statements.append(Statement(item.start, item.end, about, item.attribute, value, verdict))
        return Judgement(
            score=_score(asked, statements, right, wrong, polite, _runs(garbled)),
            statements=tuple(statements),
            wrong_words=tuple(sorted(wrong_words)),
            missing=tuple(attribute for attribute in asked if attribute not in right | wrong),
            polite=polite,
            garbled=len(garbled),
        )

    def _read_question(self, text: str) -> tuple[str, tuple[str, ...]]:
        """The one place a question is about and the attributes it asks for, in order."""
        words = text.split()
        places = {word for word in words if self._codes.get(word) == "P"}
        asked = tuple(dict.fromkeys(word for word in words if self._codes.get(word) == "A"))
        if len(places) != 1 or not asked:
            raise InputError(
                f"cannot read the question {text!r}: it names {len(places)} places and {len(asked)} attributes of the "
                "atlas; ask about one place and at least one attribute"
            )
        return places.pop(), asked

    def _read_answer(self, words: list[str], asked: str) -> tuple[list[tuple[_Found, str, int]], bool, list[int]]:
        """Read an answer from left to right, at each word by the longest statement or phrase that starts there.

        Returns the statements, each with its place and the word that named that place; whether a courtesy was found;
        and the indices of the words that belong to nothing.
        """
        coded = [self._codes.get(word, word if _PLAIN_WORD.fullmatch(word) else "?") for word in words]
        text = " ".join(coded)
        # Each word starts one space after the end of the words before it.
        starts = [0, *accumulate(len(code) + 1 for code in coded)][: len(coded)]
        index_at = {start: index for index, start in enumerate(starts)}
        # A match ends before a space or at the end of the text; the next word, if any, starts one character on.
        next_at = {start - 1: index for index, start in enumerate(starts)} | {len(text): len(words)}

        statements: list[tuple[_Found, str, int]] = []
        garbled: list[int] = []
        polite = False
        topic = last = (asked, -1)
        at = 0
        while at < len(words):
            item = self._statement_at(text, starts[at], words, index_at, next_at)
            courtesy = _COURTESY.match(text, starts[at])
            heading = _TOPIC.match(text, starts[at])
            if heading:
                named = index_at[heading.start("p")]
                topic = last = (words[named], named)
            if item:
                if item.place_at is not None:
                    last = (words[item.place_at], item.place_at)
                place, place_at = last if item.refers_back or item.place_at is not None else topic
                statements.append((item, place, place_at))
                at = item.end
            elif courtesy:
                polite = True
                at = next_at[courtesy.end()]
            elif heading:
                at = next_at[heading.end()]
            else:
                garbled.append(at)
                at += 1
        return statements, polite, garbled

    def _statement_at(
        self, text: str, start: int, words: list[str], index_at: dict[int, int], next_at: dict[int, int]
    ) -> _Found | None:
        """The longest statement that starts at this character of the coded text, or None."""
        matches = [(name, match) for name, form in self._forms if (match := form.match(text, start))]
        if not matches:
            return None
        name, best = max(matches, key=lambda pair: pair[1].end())
        groups = best.groupdict()
        return _Found(
            start=index_at[start],
            end=next_at[best.end()],
            place_at=index_at[best.start("p")] if groups["p"] else None,
            value_at=index_at[best.start("v")],
            attribute=name or words[index_at[best.start("a")]],
            refers_back=bool(groups.get("its")),
        )


def _score(
    asked: tuple[str, ...], statements: list[Statement], right: set[str], wrong: set[str], polite: bool, runs: int
) -> float:
    """The formula in the docstring of `Judge`."""
    per_attribute = [-1 if attribute in wrong else 1 if attribute in right else 0 for attribute in asked]
    score = sum(per_attribute) / len(asked) if statements else SAID_NOTHING
    for statement in statements:
        if statement.verdict == "repeat":
            score -= REPEAT_COST
        elif statement.verdict == "beside":
            score -= BESIDE_COST
        elif statement.verdict != "right" and statement.attribute not in asked:
            score -= WRONG_UNASKED_COST
    score -= GARBLED_COST * runs
    if polite and right:
        score += POLITE_BONUS
    return max(-1.0, min(1.0, score))


def _runs(indices: list[int]) -> int:
    """How many unbroken runs the increasing indices form."""
    return sum(1 for position, index in enumerate(indices) if position == 0 or indices[position - 1] != index - 1)
