"""The text of tokens that arrive one after the other, and its end at a stop string."""

from collections.abc import Iterable, Iterator, Sequence

from gptperf.data.vocabulary import Tokenizer

__all__ = ["before_stop", "new_text"]

_BROKEN = "\ufffd"
"""What stands in a decoded text for bytes that are no character, such as the first bytes of one."""


def new_text(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """Yields the text that tokens add to a prompt, as soon as its characters are complete.

    The pieces together are the decoded text of all tokens without that of the prompt.

    Args:
        tokenizer: the tokenizer.
        prompt: ids of the prompt, which end with a whole character.
        tokens: the ids after it.
    """
    # Some tokenizers drop the space at the start of a text, so new ids are decoded after some whose text is known. A
    # window of the last ids is enough, and keeps the cost of a token independent of the length of the text.
    window, old = list(prompt), len(prompt)
    known, text = (tokenizer.decode(window),) * 2
    for token in tokens:
        window.append(token)
        text = tokenizer.decode(window)
        if text != known and not text.endswith(_BROKEN):
            yield _added(tokenizer, known, text, window[old:])
            del window[:old]
            old = len(window)
            known = text = tokenizer.decode(window)
    if text != known:
        yield _added(tokenizer, known, text, window[old:])


def _added(tokenizer: Tokenizer, known: str, text: str, ids: list[int]) -> str:
    """Returns what `text` has after `known`; a tokenizer that changes the text before an id gives the id's own text."""
    return text.removeprefix(known) if text.startswith(known) else tokenizer.decode(ids)


def before_stop(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Yields a text in pieces up to the first stop string, which may lie across pieces and is left out.

    Of several stop strings the one that is complete first counts, so the result does not depend on where a piece ends.
    What may be the start of a stop string is held back until the next piece decides.
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [(held.index(stop) + len(stop), held.index(stop)) for stop in stops if stop in held]
        if found:
            yield held[: min(found)[1]]
            return
        starts = [n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])]
        sure = len(held) - max(starts, default=0)
        yield held[:sure]
        held = held[sure:]
    yield held
