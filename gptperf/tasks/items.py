"""What a task is made of, and how the record of each format becomes an item.

The prompts are those of lm-evaluation-harness, so that scores compare with published ones.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gptperf.errors import DataError
from gptperf.formats import counted

__all__ = ["FORMATS", "Fields", "Format", "Item", "Task"]

_NOTES = re.compile(r"\[.*?\]")
_SHOWN = 60


class Item(NamedTuple):
    """A question, with a context and a continuation for each choice. The last-word kind has one choice, the target."""

    where: str
    """Place in its file, for messages."""
    pairs: tuple[tuple[str, str], ...]
    """Context and continuation of each choice."""
    answer: int
    """Number of the right choice."""
    sizes: tuple[int, ...]
    """Bytes of each choice, by which `acc_norm` divides its log-likelihood."""
    passage: str
    """The text with the right answer and without the words of the prompt, to look for in training data."""


@dataclass(frozen=True)
class Task:
    """The items of a file."""

    name: str
    kind: str
    """choice: the likeliest choice counts. context: the same, and choices differ in the context, not in what is scored.
    target: the likeliest continuation has to be the target, token by token."""
    items: tuple[Item, ...]


class Fields:
    """The fields of one record, read with checks.

    Every method raises a `DataError` that says where, what was found and what is wanted.
    """

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where, self._values = where, values

    def problem(self, name: str, found: object, wanted: str) -> DataError:
        """Returns the error about a field."""
        shown = repr(found)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        return DataError(f"{self.where}: {name}: found {shown}, wanted {wanted}")

    def value(self, *names: str) -> Any:
        """Returns the value under nested names."""
        value: Any = self._values
        for depth, name in enumerate(names):
            if not isinstance(value, Mapping):
                raise self.problem(".".join(names[:depth]), value, f"an object with {name!r}")
            if name not in value:
                raise DataError(
                    f"{self.where}: found no field {'.'.join(names[: depth + 1])!r}, which an item of this format has"
                )
            value = value[name]
        return value

    def has(self, name: str) -> bool:
        """Returns whether there is a field of this name."""
        return name in self._values

    def text(self, *names: str, blank: bool = False) -> str:
        """Returns a text, which may be blank only if `blank` is set."""
        value = self.value(*names)
        if not isinstance(value, str):
            raise self.problem(".".join(names), value, "a text")
        if not blank and not value.strip():
            raise self.problem(".".join(names), value, "a text that is not blank")
        return value

    def texts(self, *names: str) -> list[str]:
        """Returns a list of two or more texts that are not blank."""
        name, values = ".".join(names), self.value(*names)
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise self.problem(name, values, "a list of texts")
        return self.choices(name, list(values))

    def choices(self, name: str, values: Sequence[Any]) -> list[str]:
        """Returns the values, which have to be two or more texts that are not blank."""
        if len(values) < 2:
            raise self.problem(name, values, "two or more choices")
        for number, value in enumerate(values):
            if not isinstance(value, str) or not value.strip():
                raise self.problem(f"{name}[{number}]", value, "a text that is not blank")
        return list(values)

    def number(self, name: str, low: int, high: int) -> int:
        """Returns a whole number, which may be written as a text."""
        value = self.value(name)
        found = int(value) if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,9}", value) else value
        if type(found) is not int or not low <= found <= high:
            hint = "" if value not in ("", -1, "-1") else "; a file without answers cannot be scored"
            raise self.problem(name, value, f"a number from {low} to {high}{hint}")
        return found


def _spaced(context: str, continuation: str) -> str:
    """Returns a continuation with the space that stands before it, unless white space is there or nothing is before."""
    return continuation if not context or context[-1].isspace() or continuation[0].isspace() else f" {continuation}"


def _size(text: str) -> int:
    return len(text.encode("utf-8", errors="replace"))


def _chosen(fields: Fields, context: str, choices: Sequence[str], answer: int, about: str | None = None) -> Item:
    """Returns an item whose choices follow one context.

    Args:
        fields: The record, for messages.
        context: Text before the choices.
        choices: The choices.
        answer: Number of the right one.
        about: Text before the right choice in `Item.passage`; default: the context.
    """
    pairs = tuple((context, _spaced(context, choice)) for choice in choices)
    about = context if about is None else about
    passage = about + _spaced(about, choices[answer])
    return _item(fields, pairs, answer, passage, tuple(map(_size, choices)))


def _item(
    fields: Fields, pairs: tuple[tuple[str, str], ...], answer: int, passage: str, sizes: tuple[int, ...]
) -> Item:
    same = [number for number, pair in enumerate(pairs) if pair == pairs[answer]]
    if len(same) > 1:
        listed = " and ".join(map(str, same))
        raise DataError(
            f"{fields.where}: found the right answer {pairs[answer][1].strip()[:_SHOWN]!r} as the choices {listed} "
            "(counted from 0), wanted it as one choice"
        )
    return Item(fields.where, pairs, answer, sizes, passage)


def _clean(text: str) -> str:
    """Returns a text of HellaSwag without the marks of WikiHow: titles end a sentence, notes in brackets go."""
    return _NOTES.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _hellaswag(fields: Fields) -> Item:
    first, second = fields.text("ctx_a", blank=True), fields.text("ctx_b", blank=True)
    endings = [_clean(ending) for ending in fields.texts("endings")]
    fields.choices("endings", endings)
    context = _clean(f"{fields.text('activity_label')}: {first} {second.capitalize()}")
    answer = fields.number("label", 0, len(endings) - 1)
    return _chosen(fields, context, endings, answer, _clean(f"{first} {second}"))


def _arc(fields: Fields) -> Item:
    if isinstance(fields.value("question"), str):
        question, choices, labels = (fields.text("question"), fields.texts("choices", "text"), ("choices", "label"))
        names = [str(label) for label in fields.value(*labels)]
    else:
        question, listed = fields.text("question", "stem"), fields.value("question", "choices")
        if not isinstance(listed, Sequence) or not all(isinstance(choice, Mapping) for choice in listed):
            raise fields.problem("question.choices", listed, "a list of objects with text and label")
        choices = fields.choices("question.choices", [choice.get("text") for choice in listed])
        names = [str(choice.get("label")) for choice in listed]
    if len(names) != len(choices):
        raise fields.problem("choices.label", names, f"{counted(len(choices), 'label')}, one per choice")
    key = fields.value("answerKey")
    if names.count(str(key)) != 1:
        raise fields.problem("answerKey", key, f"one of {', '.join(names)}, each the label of one choice")
    return _chosen(fields, f"Question: {question}\nAnswer:", choices, names.index(str(key)), question)


def _piqa(fields: Fields) -> Item:
    goal, choices = fields.text("goal"), [fields.text("sol1"), fields.text("sol2")]
    return _chosen(fields, f"Question: {goal}\nAnswer:", choices, fields.number("label", 0, 1), goal)


def _winogrande(fields: Fields) -> Item:
    sentence, options = fields.text("sentence"), [fields.text("option1"), fields.text("option2")]
    before, blank, after = sentence.partition("_")
    if not blank or not after.strip():
        raise fields.problem("sentence", sentence, "a blank _ with text after it")
    return _contexts(fields, [before + option for option in options], after.strip(), fields.number("answer", 1, 2) - 1)


def _schema(fields: Fields) -> Item:
    contexts = fields.texts("context_options")
    answer = fields.number("gold", 0, len(contexts) - 1)
    return _contexts(fields, contexts, fields.text("continuation"), answer)


def _contexts(fields: Fields, contexts: Sequence[str], continuation: str, answer: int) -> Item:
    """Returns an item whose choices are contexts of one continuation."""
    pairs = tuple((context, _spaced(context, continuation)) for context in contexts)
    return _item(fields, pairs, answer, "".join(pairs[answer]), (_size(continuation),) * len(pairs))


def _lambada(fields: Fields) -> Item:
    text = fields.text("text").rstrip()
    context, space, word = text.rpartition(" ")
    if not context.strip():
        raise fields.problem("text", text, "a passage of several words, whose last word is the target")
    return _target(fields, context, space + word)


def _own_target(fields: Fields) -> Item:
    context, target = ("prompt", "target") if fields.has("target") else ("context", "continuation")
    return _target(fields, fields.text(context, blank=True), fields.text(target))


def _target(fields: Fields, context: str, target: str) -> Item:
    pair = (context, _spaced(context, target))
    return _item(fields, (pair,), 0, "".join(pair), (_size(target),))


def _own_choices(fields: Fields) -> Item:
    prompt, gold = ("prompt", "answer") if fields.has("prompt") else ("query", "gold")
    choices, answer = fields.texts("choices"), fields.value(gold)
    if isinstance(answer, str):
        if choices.count(answer) != 1:
            raise fields.problem(gold, answer, f"one of the choices, or a number from 0 to {len(choices) - 1}")
        number = choices.index(answer)
    else:
        number = fields.number(gold, 0, len(choices) - 1)
    return _chosen(fields, fields.text(prompt, blank=True), choices, number)


class Format(NamedTuple):
    """A format of records."""

    kind: str
    """See `Task.kind`."""
    fields: tuple[frozenset[str], ...]
    """Sets of fields; a record of this format has all fields of one set."""
    read: Callable[[Fields], Item]


def _fields(*sets: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(names.split()) for names in sets)


FORMATS = {
    "HellaSwag": Format("choice", _fields("ctx_a ctx_b activity_label endings label"), _hellaswag),
    "ARC": Format("choice", _fields("question answerKey"), _arc),
    "PIQA": Format("choice", _fields("goal sol1 sol2"), _piqa),
    "Winogrande": Format("context", _fields("sentence option1 option2 answer"), _winogrande),
    "LAMBADA": Format("target", _fields("text"), _lambada),
    "choices": Format("choice", _fields("prompt choices answer", "query choices gold"), _own_choices),
    "contexts": Format("context", _fields("context_options continuation gold"), _schema),
    "target": Format("target", _fields("prompt target", "context continuation"), _own_target),
}
"""Name of a format -> the format. The last three are for tasks of one's own, and for the files of DCLM's CORE."""
