"""Small task files of every format, and a scorer of one item at a time."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gptperf.data.tokenizers import Tokenizer
from gptperf.model import GPT

HELLASWAG = {
    "ctx_a": "A man is [step] sitting.",
    "ctx_b": "he",
    "activity_label": "Sitting [title] well",
    "endings": ["stands up [title] Then runs.", "eats  the  chair.", "sings [note] a song", "is an oak"],
    "label": 2,
}
ARC = {
    "question": {
        "stem": "Which one barks?",
        "choices": [{"text": "a dog", "label": "A"}, {"text": "a stone", "label": "B"}, {"text": "it", "label": "C"}],
    },
    "answerKey": "A",
}
ARC_HUB = {
    "question": "What is round?",
    "choices": {"text": ["a ball", "a line"], "label": ["1", "2"]},
    "answerKey": "1",
}
PIQA = {"goal": "Open a jar.", "sol1": "Turn the lid.", "sol2": "Eat it.", "label": 0}
WINOGRANDE = {"sentence": "Ann beat Bob as _ was fast.", "option1": "Ann", "option2": "Bob", "answer": "1"}
LAMBADA = {"text": "he took his hat and left the house"}
CHOICES = {"prompt": "2 + 2 =", "choices": ["4", "5", "many"], "answer": "4"}
CORE_CHOICES = {"query": "Sky:\n", "choices": ["blue", "green"], "gold": 0}
CONTEXTS = {"context_options": ["The cat", "The sun"], "continuation": "sleeps.", "gold": 1}
TARGET = {"prompt": "one two", "target": "three"}
CORE_TARGET = {"context": "a b c ", "continuation": "d"}

ASKED: dict[str, tuple[dict[str, Any], list[tuple[str, str]], int]] = {
    "hellaswag": (
        HELLASWAG,
        [
            ("Sitting. well: A man is sitting. He", " stands up. Then runs."),
            ("Sitting. well: A man is sitting. He", " eats the chair."),
            ("Sitting. well: A man is sitting. He", " sings a song"),
            ("Sitting. well: A man is sitting. He", " is an oak"),
        ],
        2,
    ),
    "arc": (ARC, [("Question: Which one barks?\nAnswer:", f" {text}") for text in ("a dog", "a stone", "it")], 0),
    "arc_hub": (ARC_HUB, [("Question: What is round?\nAnswer:", f" {text}") for text in ("a ball", "a line")], 0),
    "piqa": (PIQA, [("Question: Open a jar.\nAnswer:", f" {text}") for text in ("Turn the lid.", "Eat it.")], 0),
    "winogrande": (WINOGRANDE, [(f"Ann beat Bob as {name}", " was fast.") for name in ("Ann", "Bob")], 0),
    "lambada": (LAMBADA, [("he took his hat and left the", " house")], 0),
    "choices": (CHOICES, [("2 + 2 =", " 4"), ("2 + 2 =", " 5"), ("2 + 2 =", " many")], 0),
    "core_choices": (CORE_CHOICES, [("Sky:\n", "blue"), ("Sky:\n", "green")], 0),
    "contexts": (CONTEXTS, [("The cat", " sleeps."), ("The sun", " sleeps.")], 1),
    "target": (TARGET, [("one two", " three")], 0),
    "core_target": (CORE_TARGET, [("a b c ", "d")], 0),
}
"""Name -> a record, the contexts and continuations that it asks for, and the number of the right one."""


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def reference(model: GPT, tokenizer: Tokenizer, context: str, continuation: str, shots: str = "") -> tuple[float, bool]:
    """Log-likelihood of a continuation, and whether it is greedy: one sequence, in float64, token by token."""
    context = shots + context
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = tokenizer.encode(context + continuation).tolist()
    begin = len(tokenizer.encode(context))
    if begin == 0:
        whole, begin = [tokenizer.eot, *whole], 1
    inputs, targets = whole[:-1], whole[begin:]
    inputs = inputs[-model.config.block_size :]
    exact = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        logits = exact(torch.tensor([inputs]))[0, -len(targets) :]
    logs = logits.log_softmax(-1)
    total = sum(logs[i, token].item() for i, token in enumerate(targets))
    return total, logits.argmax(-1).tolist() == targets
