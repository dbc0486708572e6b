"""Find tool calls in an answer that arrives in pieces. Pure.

What is no call is content, as the model wrote it, also where it began like one. A call is told as soon as its name
is known, and its arguments as they come, whatever they are: whether they are JSON is for the client to see.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import NamedTuple

from sllm_actor.frontend.tool_formats import ToolFormat

SPACE = " \n\r\t"
# Longer than this no call's name stands before its arguments; what is longer is content.
MAX_HEAD_CHARACTERS = 65536


class Content(NamedTuple):
    """Text for the user."""

    text: str


class CallBegins(NamedTuple):
    """A call of the function `name`."""

    name: str


class Arguments(NamedTuple):
    """A piece of the arguments of the call that began last."""

    text: str


Event = Content | CallBegins | Arguments


class _Value:
    """Follows one JSON value to its end, character by character; it need not be a right one."""

    def __init__(self) -> None:
        self.text = ""
        self.ended = False
        self._depth = 0
        self._quoted = False
        self._escaped = False

    def take(self, character: str) -> bool:
        """Take a character; false for one that stands behind the value already."""
        if self._quoted:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._quoted = False
                self.ended = self._depth == 0
        elif self._depth == 0 and self.text and character in ",}]" + SPACE:
            self.ended = True
            return False
        elif character == '"':
            self._quoted = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.ended = self._depth <= 0
        self.text += character
        return True


class _Call:
    """Reads one object with a name and arguments. `raw` is all of it so far; `wrong` that it is no call."""

    def __init__(self, arguments: str, names: Collection[str] | None) -> None:
        self._arguments = arguments
        self._names = names
        self.raw = ""
        self.begun = False
        self.ended = False
        self.wrong = False
        self._key: str | None = None
        self._expects = "{"
        self._value = _Value()
        self._name: str | None = None
        self._early: str | None = None
        self._told = 0

    def take(self, character: str) -> list[Event]:
        self.raw += character
        if self._expects == "value" and (self._value.text or character not in SPACE):
            taken = self._value.take(character)
            events = self._value_events()
            if taken or self.wrong:
                return events
            return events + self._structure(character)
        return self._structure(character)

    def _structure(self, character: str) -> list[Event]:
        """Take what stands between keys and values."""
        if character in SPACE:
            return []
        if character == self._expects == "{" or (character == "," and self._expects == ","):
            self._expects, self._value = "key", _Value()
        elif self._expects == "key" and (character == '"' or self._value.text):
            self._value.take(character)
            if self._value.ended:
                self._key, self._expects = _string(self._value.text), ":"
        elif character == self._expects == ":":
            self._expects, self._value, self._told = "value", _Value(), 0
        elif character == "}" and self._expects in (",", "key"):
            return self._end()
        else:
            # Behind its arguments a call that has begun can't be taken back: it ends here.
            self.ended, self.wrong = self.begun, not self.begun
        return []

    def _value_events(self) -> list[Event]:
        value, events = self._value, list[Event]()
        if value.ended:
            self._expects = ","
        if self._key == "name" and value.ended:
            self._name = _string(value.text)
            if not self._name or (self._names is not None and self._name not in self._names):
                self.wrong = True
            elif self._early is not None:
                events = self._begin()
        elif self._key == self._arguments:
            if self._name is None:
                self._early = value.text
            elif not value.text.startswith('"'):
                events = [] if self.begun else self._begin()
                events.append(Arguments(value.text[self._told :]))
                self._told = len(value.text)
            elif value.ended:
                # Some models write the arguments as a string that has the JSON in it.
                events = [*self._begin(), Arguments(_string(value.text) or "")]
        return events

    def _begin(self) -> list[Event]:
        assert self._name is not None
        self.begun = True
        begins: list[Event] = [CallBegins(self._name)]
        if self._early is not None:
            early = _string(self._early) if self._early.startswith('"') else self._early
            begins.append(Arguments(early or ""))
        return begins

    def _end(self) -> list[Event]:
        self.ended = True
        if self.begun:
            return []
        if self._name is None:
            self.wrong = True
            return []
        return [*self._begin(), Arguments("{}")]


def _string(text: str) -> str | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


class ToolParser:
    """Reads one answer. `calls` counts those that have begun."""

    def __init__(self, form: ToolFormat, names: Collection[str]) -> None:
        self._form = form
        # Without a mark of its own, only an object that names a known function is a call.
        self._names = None if form.begin else names
        self._inside = not form.begin
        self._held = ""
        self._call: _Call | None = None
        self._marked_calls = 0
        self.calls = 0

    def push(self, text: str) -> list[Event]:
        """Take a piece of text and give what it makes known."""
        events: list[Event] = []
        for character in text:
            events += self._take(character)
        return _joined(events)

    def flush(self) -> list[Event]:
        """Give what was held back, now that nothing more comes."""
        held, self._held = self._held, ""
        if self._call is not None and not self._call.begun:
            held += self._call.raw
        elif self._marked_calls and not held.strip(SPACE + self._separators()):
            held = ""
        self._call = None
        return [Content(held)] if held else []

    def _separators(self) -> str:
        return "[],;" if self._form.listed or not self._form.begin else ""

    def _take(self, character: str) -> list[Event]:
        if self._call is not None:
            return self._take_call(self._call, character)
        self._held += character
        return self._between() if self._inside else self._outside()

    def _take_call(self, call: _Call, character: str) -> list[Event]:
        events = call.take(character)
        if call.begun and any(isinstance(event, CallBegins) for event in events):
            self.calls += 1
            self._marked_calls += 1
            self._held = ""
        if call.wrong or (not call.begun and len(call.raw) > MAX_HEAD_CHARACTERS):
            self._held += call.raw
            self._call = None
            return self._give_up()
        if call.ended:
            self._call = None
        return events

    def _outside(self) -> list[Event]:
        """Look for the mark that calls begin with; show what can't be its beginning."""
        begin = self._form.begin
        if not begin:
            return self._give_up()
        if self._held.endswith(begin):
            shown = self._held[: -len(begin)]
            self._held, self._inside, self._marked_calls = begin, True, 0
            # Space before a call only sets it off.
            return [Content(shown)] if shown.strip(SPACE) else []
        for length in range(min(len(self._held), len(begin) - 1), 0, -1):
            if begin.startswith(self._held[-length:]):
                break
        else:
            length = 0
        # Space waits, too: a mark may follow it.
        body = self._held[: len(self._held) - length]
        keep = length + len(body) - len(body.rstrip(SPACE))
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return [Content(shown)] if shown else []

    def _between(self) -> list[Event]:
        """Look for the next call, or for the end of them."""
        form, text = self._form, self._held[len(self._form.begin) if not self._marked_calls else 0 :]
        if text.endswith("{"):
            self._held = self._held[:-1]
            self._call = _Call(form.arguments, self._names)
            return self._take_call(self._call, "{")
        rest = text.strip(SPACE + self._separators())
        if not rest:
            return []
        if form.end and form.end.startswith(rest):
            if form.end == rest and self._marked_calls:
                self._held, self._inside = "", False
            return []
        return self._give_up()

    def _give_up(self) -> list[Event]:
        """Take what was held for content: it is no call."""
        held, self._held = self._held, ""
        self._inside = False
        return [Content(held)] if held else []


def _joined(events: list[Event]) -> list[Event]:
    """Put neighbours of a kind together, and leave out what is empty."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, Content) and isinstance(last, Content):
            joined[-1] = Content(last.text + event.text)
        elif isinstance(event, Arguments) and isinstance(last, Arguments):
            joined[-1] = Arguments(last.text + event.text)
        elif isinstance(event, CallBegins) or event.text:
            joined.append(event)
    return joined
