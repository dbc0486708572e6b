"""Ask what the demo model was made for, and know the right answer.

Two-digit sums and differences, counts between any two numbers up to 999, and things the model must decline.
A stable hash of (kind, a, b) holds out a tenth of all pairs; training never sees one of those in any
phrasing, so a right answer to a question from `unseen` was computed and not remembered. Pure Python: it knows
no model, tokenizer or tensor.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache
from pathlib import Path

DEMO_MODEL = Path(__file__).resolve().parent.parent / "models" / "demo"
"""The folder of the model that answers these questions."""
OPERAND_MAX = 99
"""Largest operand of a sum or a difference; the smallest is 0."""
COUNTED_MAX = 999
"""Largest number counted; the smallest is 0."""
SEPARATOR = ", "
"""Stands between counted numbers; one token."""
REFUSAL = "Sorry, I can only add, subtract and count."
HELD_OUT_PERCENT = 10


class Kind(StrEnum):
    """What a question asks for."""

    ADD = "add"
    SUBTRACT = "subtract"
    COUNT = "count"
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A user's message and the only right answer to it; `operands` is empty for `Kind.OTHER`."""

    prompt: str
    answer: str
    kind: Kind
    operands: tuple[int, ...] = ()


SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a careful calculator.",
    "Answer briefly.",
    "You add, subtract and count.",
    "You are a friendly and patient teacher of mathematics.",
    "Be concise and polite.",
    "You are a test model. Answer every question exactly.",
)

# In every phrasing {a} comes first in the answer: "Subtract {b} from {a}." is answered by "{a} - {b} = …".
PHRASINGS: dict[Kind, tuple[str, ...]] = {
    Kind.ADD: (
        "What is {a} + {b}?",
        "What is {a} plus {b}?",
        "Add {a} and {b}.",
        "{a} + {b} = ?",
        "How much is {a} + {b}?",
        "How much is {a} plus {b}?",
        "Please add {a} and {b}.",
        "Add {a} to {b}.",
        "What's {a} + {b}?",
        "Calculate {a} + {b}.",
        "Compute {a} plus {b}.",
        "What is the sum of {a} and {b}?",
        "Can you add {a} and {b}?",
        "{a} + {b}",
        "{a}+{b}",
        "{a} + {b} =",
    ),
    Kind.SUBTRACT: (
        "What is {a} - {b}?",
        "What is {a} minus {b}?",
        "Subtract {b} from {a}.",
        "{a} - {b} = ?",
        "How much is {a} - {b}?",
        "How much is {a} minus {b}?",
        "Please subtract {b} from {a}.",
        "Take {b} away from {a}.",
        "What's {a} - {b}?",
        "Calculate {a} - {b}.",
        "Compute {a} minus {b}.",
        "Can you subtract {b} from {a}?",
        "{a} - {b}",
        "{a}-{b}",
        "{a} - {b} =",
    ),
    Kind.COUNT: (
        "Count from {a} to {b}.",
        "Please count from {a} to {b}.",
        "Can you count from {a} to {b}?",
        "Count for me from {a} to {b}.",
        "Start at {a} and count to {b}.",
        "List the numbers from {a} to {b}.",
        "Count from {a} to {b}, please.",
        "Write all numbers from {a} to {b}.",
    ),
}
_UPWARDS = ("Count up from {a} to {b}.", "Count from {a} up to {b}.")
_DOWNWARDS = ("Count down from {a} to {b}.", "Count from {a} down to {b}.")
_FROM_ONE = ("Count to {b}.", "Please count to {b}.", "Can you count to {b}?")

_OTHER = (
    "Hello!", "Hi there.", "Good morning!", "Thank you.", "How are you?", "Who are you?", "What can you do?",
    "What is your name?", "Tell me a joke.", "What time is it?", "What is the capital of {noun}?",
    "Write a poem about {noun}.", "Translate {noun} into French.", "Explain how a {noun} works.",
    "Who invented the {noun}?", "Why is the {noun} {adjective}?", "What is a {noun}?",
    "What is the {adjective} {noun}?", "Is the {noun} {adjective}?", "Where can I buy a {adjective} {noun}?",
    "Give me a recipe with {noun} and {noun}.", "Do you like {noun}?", "Tell me about {noun}.",
    "Tell me a story about {a} {noun}s.", "How many {noun}s are there?", "How much is a {noun}?",
    "How much is {a} {noun}s?", "How do I fix my {noun}?", "Summarize the story of the {adjective} {noun}.",
    "Write a program that sorts {noun}s.", "What should I eat today?", "Please help me with my {noun}.",
    "Can you write a letter to my {noun}?", "Can you sing?", "Add some {noun} to my list.",
    "Subtract the {noun}.", "Count the {noun}s.", "Count from {noun} to {noun}.", "List all {noun}s.",
    "What is love?", "What is {a} times {b}?", "What is {a} * {b}?", "Multiply {a} by {b}.",
    "Divide {a} by {b}.", "What is {a} / {b}?", "{a} * {b} = ?", "{a} / {b}", "How much is {a} times {b}?",
    "What is {a} percent of {b}?", "Is {a} greater than {b}?", "What is the square root of {a}?",
    "Is {a} a prime number?", "What is {a}?", "{a}", "Tell me about the year {large}.",
    "What is {large} + {b}?", "What is {a} + {large}?", "Add {a} and {large}.", "What is {large} - {b}?",
    "Subtract {large} from {a}.", "What is {a} minus {large}?", "Count from {a} to {huge}.",
    "Count from {huge} to {a}.", "What is {a} + {b} + {c}?", "Calculate {a} - {b} - {c}.",
    "I have {a} {noun}s and {b} {noun}s.", "{words}", "{words}", "{words}?", "{words}.",
    "{words} {a} {words}", "What is {words}?", "Please {words}.", "Can you {words}?", "{unicode}",
)  # fmt: skip
_NOUNS, _ADJECTIVES, _WORDS = (
    text.split()
    for text in (
        """
        France Japan Brazil bread water house dog cat moon sun tree river book song train car garden
        computer network apple clock letter school teacher friend mother doctor horse bird mountain
        ocean bridge window guitar piano robot planet coffee cheese soup rain snow winter king queen
        castle bicycle engine memory model question answer number
        """,
        """
        red blue green big small old new fast slow happy sad bright dark warm cold best longest
        strange
        """,
        """
        the of and a to in is you that it he was for on are as with his they I at be this have from or
        one had by word but not what all were we when your can said there use an each which she do how
        their if will up other about out many then them these so some her would make like him into
        time has look two more write go see no way could people my than first been call who its now
        find long down day did get come made may part over after back little only round man year came
        show every good me give our under name very through just form sentence great think say help
        low line differ turn cause much mean before move right boy too same tell does set three want
        air well also play end put home read hand why light kind off need try us again point world
        near build self earth father head stand own page should country
        """,
    )
)
_UNICODE_RANGES = (
    (0x21, 0x2F), (0x41, 0x7E), (0xC0, 0x17F), (0x391, 0x3C9), (0x410, 0x44F), (0x4E00, 0x4FFF),
    (0x1F600, 0x1F64F),
)  # fmt: skip
_ROUND = [n for n in range(10, COUNTED_MAX + 1) if len(set(str(n))) == 1 or n % 100 in (0, 99)]


def held_out(kind: Kind, a: int, b: int) -> bool:
    """Tell whether training must never see this pair; a sum is held out together with its mirror image.

    The two counts of the full range are held out as well: they test the whole reach of the model.
    """
    if kind is Kind.COUNT and abs(a - b) == COUNTED_MAX:
        return True
    low, high = (min(a, b), max(a, b)) if kind is Kind.ADD else (a, b)
    return _bucket(f"{kind.value}:{low}:{high}") < HELD_OUT_PERCENT


def add(a: int, b: int, phrasing: str = PHRASINGS[Kind.ADD][0]) -> Question:
    """Ask for a sum of two numbers up to `OPERAND_MAX`."""
    return _asked(Kind.ADD, a, b, phrasing)


def subtract(a: int, b: int, phrasing: str = PHRASINGS[Kind.SUBTRACT][0]) -> Question:
    """Ask for the difference `a - b` of two numbers up to `OPERAND_MAX`."""
    return _asked(Kind.SUBTRACT, a, b, phrasing)


def count(a: int, b: int, phrasing: str = PHRASINGS[Kind.COUNT][0]) -> Question:
    """Ask to count from `a` to `b`, either way, both up to `COUNTED_MAX`."""
    return _asked(Kind.COUNT, a, b, phrasing)


def is_right(question: Question, answer_text: str) -> bool:
    """Compare an answer, decoded without special tokens, with the only right one; outer white space aside."""
    return answer_text.strip() == question.answer


def unseen(seed: int, how_many: int, kind: Kind | None = None) -> list[Question]:
    """Draw questions that no training has seen; without `kind`, sums, differences and counts in turn."""
    chance = random.Random(f"unseen:{seed}")
    kinds = (kind,) if kind else (Kind.ADD, Kind.SUBTRACT, Kind.COUNT)
    return [_drawn(chance, kinds[index % len(kinds)], wanted_held_out=True) for index in range(how_many)]


def every_unseen(kind: Kind) -> Iterator[Question]:
    """Yield every held-out pair of a sum or a difference in every phrasing."""
    assert kind in (Kind.ADD, Kind.SUBTRACT), "the held-out counts are too many to list"
    for a in range(OPERAND_MAX + 1):
        for b in range(OPERAND_MAX + 1):
            if held_out(kind, a, b):
                yield from (_asked(kind, a, b, phrasing) for phrasing in PHRASINGS[kind])


def training(seed: int, kind: Kind | None = None) -> Iterator[Question]:
    """Yield questions for ever, none of them held out; some are written carelessly, as users do."""
    chance = random.Random(f"training:{seed}")
    kinds, weights = list(Kind), (24, 26, 42, 8)
    while True:
        drawn = _drawn(chance, kind or chance.choices(kinds, weights)[0], wanted_held_out=False)
        yield _careless(chance, drawn) if chance.random() < 0.15 else drawn


def count_of_length(answer_tokens: int, *, seed: int = 0, upwards: bool = True) -> Question:
    """Ask for an unseen count whose answer is about this many tokens, end of answer included (2 to 3,890).

    About: within four tokens, the length of one number. The longest of all, 0 to 999, is in reach.
    """
    chance = random.Random(f"length:{seed}:{answer_tokens}:{upwards}")
    ends = _ends_of_length(answer_tokens, chance.sample(range(COUNTED_MAX + 1), COUNTED_MAX + 1))
    pairs = ends if upwards else ((last, first) for first, last in ends)
    a, b = next(((a, b) for a, b in pairs if held_out(Kind.COUNT, a, b)), (0, 0))
    if (a, b) == (0, 0):
        a, b = (0, COUNTED_MAX) if upwards else (COUNTED_MAX, 0)
    return count(a, b)


def count_tokens(a: int, b: int) -> int:
    """Tell how many tokens the answer has: one a digit, one a separator, one for the end."""
    return sum(len(str(number)) + 1 for number in range(min(a, b), max(a, b) + 1))


@cache
def lookalikes(last: int) -> list[int]:
    """List the numbers a count may be tempted to stop at: one digit is another, or digits at an end are missing."""
    found = []
    for number in range(COUNTED_MAX + 1):
        one, other = sorted((str(number), str(last)), key=len)
        changed = sum(a != b for a, b in zip(one, other, strict=False))
        if changed == 1 if len(one) == len(other) else other.startswith(one) or other.endswith(one):
            found.append(number)
    return found


def as_chat(question: Question, *, system: str | None = None, earlier: Sequence[Question] = ()) -> list[dict[str, str]]:
    """Lay out the chat that ends with this question, `earlier` ones being answered rightly before it."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    for turn in earlier:
        messages.append({"role": "user", "content": turn.prompt})
        messages.append({"role": "assistant", "content": turn.answer})
    return [*messages, {"role": "user", "content": question.prompt}]


def system_message(chance: random.Random) -> str:
    """Make up a system message: a usual one, or one that nobody would think of."""
    if chance.random() < 0.6:
        return chance.choice(SYSTEM_MESSAGES)
    return f"{_some_words(chance).capitalize()}."


def _asked(kind: Kind, a: int, b: int, phrasing: str) -> Question:
    highest = COUNTED_MAX if kind is Kind.COUNT else OPERAND_MAX
    assert 0 <= a <= highest and 0 <= b <= highest, f"outside of what the model was made for: {a}, {b}"
    if kind is Kind.ADD:
        answer = f"{a} + {b} = {a + b}"
    elif kind is Kind.SUBTRACT:
        answer = f"{a} - {b} = {a - b}"
    else:
        step = 1 if a <= b else -1
        answer = SEPARATOR.join(str(number) for number in range(a, b + step, step))
    return Question(prompt=phrasing.format(a=a, b=b), answer=answer, kind=kind, operands=(a, b))


def _bucket(text: str) -> int:
    # Python's own hash differs from process to process; the split must not.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100


def _drawn(chance: random.Random, kind: Kind, *, wanted_held_out: bool) -> Question:
    while True:
        if kind is Kind.OTHER:
            question = _other(chance)
            if (_bucket(question.prompt.lower().strip(".?! ")) < HELD_OUT_PERCENT) is wanted_held_out:
                return question
            continue
        a, b = _counted_ends(chance) if kind is Kind.COUNT else _operands(chance)
        if held_out(kind, a, b) is wanted_held_out:
            return _asked(kind, a, b, chance.choice(_phrasings(kind, a, b)))


def _phrasings(kind: Kind, a: int, b: int) -> tuple[str, ...]:
    if kind is not Kind.COUNT:
        return PHRASINGS[kind]
    directed = _UPWARDS if a < b else _DOWNWARDS if a > b else ()
    return PHRASINGS[kind] + directed + (_FROM_ONE if 1 == a < b else ())


def _operands(chance: random.Random) -> tuple[int, int]:
    # Small operands are a hundredth of all pairs but a good part of what people type.
    shape = chance.random()
    a_max = 20 if shape < 0.2 else OPERAND_MAX
    b_max = 20 if shape < 0.15 or shape > 0.95 else OPERAND_MAX
    return chance.randint(0, a_max), chance.randint(0, b_max)


def _counted_ends(chance: random.Random) -> tuple[int, int]:
    shape = chance.random()
    if shape < 0.5:
        return chance.randint(0, COUNTED_MAX), chance.randint(0, COUNTED_MAX)
    if shape < 0.56:
        # What people type first: small numbers, and "Count to 10."
        return (1, chance.randint(2, 120)) if shape < 0.53 else (chance.randint(0, 12), chance.randint(0, 12))
    if shape < 0.68:
        # Round and repeated digits: 99 is easily taken for the end of a count to 999.
        low, high = chance.choice((chance.randint(0, 120), chance.choice(_ROUND))), chance.choice(_ROUND)
        return (low, high) if chance.random() < 0.6 else (high, low)
    a = chance.randint(0, 120) if shape < 0.8 else chance.randint(0, COUNTED_MAX)
    span = int(10 ** chance.uniform(0, 2.5)) - 1
    b = a + span if chance.random() < 0.5 else a - span
    return a, max(0, min(COUNTED_MAX, b))


def _ends_of_length(answer_tokens: int, firsts: Sequence[int]) -> Iterator[tuple[int, int]]:
    for first in firsts:
        last, tokens = first, len(str(first)) + 1
        while tokens < answer_tokens and last < COUNTED_MAX:
            last += 1
            tokens += len(str(last)) + 1
        if abs(tokens - answer_tokens) <= 4:
            yield first, last


def _other(chance: random.Random) -> Question:
    text = chance.choice(_OTHER)
    for slot, make in _SLOTS.items():
        while slot in text:
            text = text.replace(slot, make(chance), 1)
    return Question(prompt=text, answer=REFUSAL, kind=Kind.OTHER)


def _some_words(chance: random.Random) -> str:
    pool = _WORDS + _NOUNS + _ADJECTIVES
    return " ".join(chance.choices(pool, k=chance.randint(1, 12)))


def _some_unicode(chance: random.Random) -> str:
    return "".join(chr(chance.randint(*chance.choice(_UNICODE_RANGES))) for _ in range(chance.randint(1, 12)))


_SLOTS: dict[str, Callable[[random.Random], str]] = {
    "{noun}": lambda chance: chance.choice(_NOUNS),
    "{adjective}": lambda chance: chance.choice(_ADJECTIVES),
    "{words}": _some_words,
    "{unicode}": _some_unicode,
    "{a}": lambda chance: str(chance.randint(0, OPERAND_MAX)),
    "{b}": lambda chance: str(chance.randint(0, OPERAND_MAX)),
    "{c}": lambda chance: str(chance.randint(0, OPERAND_MAX)),
    "{large}": lambda chance: str(chance.randint(OPERAND_MAX + 1, 9999)),
    "{huge}": lambda chance: str(chance.randint(COUNTED_MAX + 1, 99999)),
}


def _careless(chance: random.Random, question: Question) -> Question:
    prompt = question.prompt
    if chance.random() < 0.6:
        prompt = prompt.rstrip(".?! ")
    if chance.random() < 0.6:
        prompt = prompt.lower()
    return replace(question, prompt=prompt or question.prompt)
