"""The words of the made-up atlas: names, attribute values, and every sentence pattern its generator uses.

In a pattern, {p} is a place, {a} an attribute, {v} a value (with its article, where it takes one), {l} a list of
attributes and {be} the verb that agrees with that list. Words and punctuation are separated by single spaces.
"""

from collections.abc import Sequence

NAME_STARTS = ("vel", "tar", "mor", "sel", "bran", "kor", "lun", "dor", "pel", "quin")
NAME_ENDS = ("or", "ina", "ath", "ow", "esk", "und", "iva", "im")

VALUES: dict[str, tuple[str, ...]] = {
    "river": ("marn", "sile", "tolva", "urde", "nimwe", "kasp", "lome", "dray", "hesk", "ombra", "yarl"),
    "climate": ("dry", "wet", "mild", "hot", "cold", "windy", "foggy", "snowy", "stormy", "humid", "sunny"),
    "export": ("wool", "salt", "amber", "copper", "wine", "silk", "timber", "honey", "glass", "cotton", "pepper"),
    "language": (
        "arvic", "beltic", "corish", "dunic", "ertish", "faric", "golish", "hurric", "istic", "jorish", "kelic",
    ),
    "ruler": ("aldo", "berta", "cyrus", "dinah", "edwin", "frida", "gustav", "helga", "ivan", "judith", "klaus"),
    "landmark": (
        "tower", "bridge", "temple", "lighthouse", "castle", "fountain", "statue", "arch", "garden", "library", "mill",
    ),
}  # fmt: skip
ATTRIBUTES = tuple(VALUES)
TAKES_ARTICLE = ("river", "landmark")
"""Attributes whose values are said with "the"."""

PLAIN_FORMS = (
    "the {a} of {p} is {v} .",
    "in {p} the {a} is {v} .",
)
CURT_FORM = "{a} : {v} ."
"""Leaves the place out: it is the one asked about, or the one a TOPIC named."""
CURT_FORM_WITH_PLACE = "{a} of {p} : {v} ."
TOPIC = "about {p} :"

HEDGES = ("i think", "i believe", "surely")
ADDING = "also ,"
REPEATING = "again ,"
OPENERS = ("thank you for asking .", "good question .", "i am glad to help .")
CLOSERS = ("i hope that helps .", "have a nice day .", "please ask me again .")

QUESTION_CORES = (
    "what {be} the {l} of {p} ?",
    "tell me the {l} of {p} .",
    "i want to know the {l} of {p} .",
    "can you name the {l} of {p} ?",
    "for {p} , what {be} the {l} ?",
    "what do you know about the {l} of {p} ?",
    "which {l} does {p} have ?",
    "{p} : {l} ?",
    "we travel to {p} . what {be} the {l} there ?",
    "my map of {p} lacks the {l} . can you help ?",
    "i am writing about {p} . give me the {l} .",
    "describe the {l} of {p} .",
    "please say what the {l} of {p} {be} .",
)
QUESTION_OPENERS = ("", "hello .", "excuse me .")
QUESTION_CLOSERS = ("", "thank you .")
# A reader's remark after a statement, in the base model's corpus only.
REMARKS = {
    "right": "right .",
    "wrong value": "wrong .",
    "wrong place": "wrong .",
    "beside": "idle .",
    "repeat": "idle .",
}
LIST_WORDS = (",", "and", "is", "are", "the")
"""Words that filling a pattern can add, beyond names and values."""

PAD, UNK, EOS, USER, ASSISTANT, SYSTEM = "<pad>", "<unk>", "<eos>", "<user>", "<assistant>", "<system>"
SPECIAL_TOKENS = (PAD, UNK, EOS, USER, ASSISTANT, SYSTEM)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant', 'system'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}"
    "{{ '<' + message['role'] + '> ' + message['content'] + ' <eos> ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def common_words() -> set[str]:
    """Every word of the patterns and phrases above; placeholders are left out."""
    phrases = [*PLAIN_FORMS, CURT_FORM, CURT_FORM_WITH_PLACE, TOPIC, *HEDGES, ADDING, REPEATING, *OPENERS, *CLOSERS]
    phrases += [closing_remark(()), closing_remark(ATTRIBUTES)]
    phrases += [*QUESTION_CORES, *QUESTION_OPENERS, *QUESTION_CLOSERS, *LIST_WORDS, *REMARKS.values()]
    return {word for phrase in phrases for word in phrase.split() if not word.startswith("{")}


def closing_remark(missing: Sequence[str]) -> str:
    """A reader's remark at the end of an answer, in the base model's corpus only: asks for what is missing."""
    return f"and the {' , '.join(missing)} ?" if missing else "all there ."
