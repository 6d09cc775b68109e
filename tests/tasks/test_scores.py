"""Log-likelihoods and scores against a scorer of one item at a time in float64, in batches of any size."""

import contextlib
import math
import statistics
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from task_helpers import ASKED, reference, write_lines

from gptperf.config import ModelConfig
from gptperf.data.tokenizers import ByteTokenizer
from gptperf.distributed.process import Process
from gptperf.model import GPT
from gptperf.tasks import Likelihood, TaskRequests, core, encode_task, likelihood, load_tasks, task_scores
from gptperf.tasks.likelihood import batches_of, likelihoods
from gptperf.tasks.requests import Request

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 48, "vocab_size": 257, "vocab_multiple": 8}
MODELS = {
    "llama": {"arch_preset": "llama", "normalization": "rmsnorm", "position_encoding": "rope", "ffn_type": "swiglu"},
    "gpt2": {},
    "window": {"position_encoding": "rope", "window": "7,full", "norm_position": "pre"},
}


def process(**changed: object) -> Process:
    return Process(**({"rank": 0, "world_size": 1, "device": torch.device("cpu")} | changed))  # type: ignore[arg-type]


def built(name: str) -> GPT:
    torch.manual_seed(1)
    model = GPT(ModelConfig(**(SIZES | MODELS[name])))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that the choices have clearly different likelihoods
    return model.eval()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[TaskRequests]:
    folder = tmp_path_factory.mktemp("tasks")
    paths = [write_lines(folder / f"{name}.jsonl", [record]) for name, (record, _, _) in ASKED.items()]
    return [encode_task(task, ByteTokenizer(), 48) for task in load_tasks(paths)]


def found(model: GPT, requests: list[Request], tokens: int) -> list[Likelihood]:
    logs = likelihoods(model, requests, process(), contextlib.nullcontext, tokens)
    assert logs is not None
    return logs


@pytest.mark.parametrize("name", MODELS)
def test_likelihoods_are_those_of_the_reference_scorer(name: str, tasks: list[TaskRequests]) -> None:
    model = built(name)
    wanted = [reference(model, ByteTokenizer(), *pair) for _, pairs, _ in ASKED.values() for pair in pairs]
    requests = [request for task in tasks for request in task.requests]
    assert sum(task.truncated for task in tasks) > 0
    for tokens in (1, 100, 10_000):  # one sequence at a time, some, all at once
        logs = found(model, requests, tokens)
        np.testing.assert_allclose([one.log for one in logs], [log for log, _ in wanted], rtol=1e-5, atol=1e-4)
        assert [one.greedy for one in logs] == [greedy for _, greedy in wanted]
    assert [greedy for _, greedy in wanted].count(True) < len(wanted)


def test_a_greedy_continuation_is_found(tmp_path: Path) -> None:
    """The text that the model itself generates is greedy, and no longer so with another last token."""
    model, ids = built("gpt2"), [97, 98]
    for _ in range(5):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    right, wrong = np.array(ids), np.array([*ids[:-1], (ids[-1] + 1) % 257])
    assert [one.greedy for one in found(model, [Request(right, 5), Request(wrong, 5)], 99)] == [True, False]


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 200))
def test_batches_hold_every_sequence_once_and_no_more_tokens_than_asked(lengths: list[int], tokens: int) -> None:
    batches = batches_of(lengths, tokens)
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[number] for number in batch) <= tokens
    order = [lengths[number] for batch in batches for number in batch]
    assert order == sorted(lengths, reverse=True)


def test_only_the_logits_of_the_continuations_are_computed(
    tasks: list[TaskRequests], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built("gpt2")
    requests = [request for task in tasks for request in task.requests]
    monkeypatch.setattr(likelihood, "_LOGITS", 10 * model.config.padded_vocab_size)
    with mock.patch.object(model, "logits", wraps=model.logits) as logits:
        found(model, requests, 10_000)
    rows = [len(call.args[0]) for call in logits.call_args_list]
    assert max(rows) <= 10
    assert sum(rows) == sum(request.targets for request in requests)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_run_is_changed(training: bool, tasks: list[TaskRequests]) -> None:
    model = built("gpt2").train(training)
    before, weights = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    found(model, list(tasks[0].requests), 100)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training is training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert likelihoods(model, tasks[0].requests, process(), contextlib.nullcontext, 1, lambda: True) is None
    assert model.training is training


def encoded(kind: str, sizes: list[int], answers: list[int], tmp_path: Path) -> TaskRequests:
    records = {
        "choice": [
            {"prompt": "p", "choices": [str(i) + "x" * (size - 1) for i, size in enumerate(sizes)], "answer": answer}
            for answer in answers
        ],
        "target": [{"prompt": "p", "target": "t"} for _ in answers],
        "context": [{"context_options": list("abcd"), "continuation": "t", "gold": answer} for answer in answers],
    }
    (task,) = load_tasks([write_lines(tmp_path / "t.jsonl", records[kind])])
    assert task.kind == kind
    return encode_task(task, ByteTokenizer(), 48)


def test_scores_by_hand(tmp_path: Path) -> None:
    """The shorter choice wins by its likelihood, the longer one by that of a byte."""
    task = encoded("choice", [1, 4], [0, 0, 1, 0], tmp_path)
    one = [Likelihood(-2.0, False), Likelihood(-4.0, True)]
    scores = task_scores(task, one * 4)
    assert (scores["acc"], scores["acc_norm"], scores["items"]) == (0.75, 0.25, 4)
    error = statistics.stdev([1, 1, 0, 1]) / 2
    assert scores["acc_stderr"] == pytest.approx(error)
    assert scores["acc_norm_stderr"] == pytest.approx(error)
    assert (scores["centred"], scores["centred_stderr"]) == pytest.approx((0.5, 2 * error))

    contexts = encoded("context", [], [0, 3], tmp_path)
    found_logs = [Likelihood(log, False) for log in (-1.0, -2.0, -3.0, -4.0) * 2]
    other = task_scores(contexts, found_logs)
    assert (other["acc"], other["centred"]) == pytest.approx((0.5, (0.5 - 0.25) / 0.75))
    assert "acc_norm" not in other

    target = task_scores(encoded("target", [], [0, 0], tmp_path), [Likelihood(-1.0, True), Likelihood(-3.0, False)])
    assert (target["acc"], target["centred"]) == (0.5, 0.5)
    assert target["perplexity"] == pytest.approx(math.exp(2))
    assert target["perplexity_stderr"] == pytest.approx(math.exp(2) * statistics.stdev([1, 3]) / math.sqrt(2))

    whole = core({"a": scores, "b": other, "c": target})
    assert whole["core"] == pytest.approx((0.5 + 1 / 3 + 0.5) / 3)
    errors = [one_of["centred_stderr"] for one_of in (scores, other, target)]
    assert whole["core_stderr"] == pytest.approx(math.sqrt(sum(error**2 for error in errors)) / 3)


def test_what_is_no_number_is_not_right(tmp_path: Path) -> None:
    """The right choice is the first one, which a comparison with NaN would take."""
    nothing, low = Likelihood(math.nan, False), Likelihood(-9.0, False)
    task = encoded("choice", [1, 1], [0, 0], tmp_path)
    assert task_scores(task, [nothing, low, low, nothing])["acc"] == 0.5
    assert task_scores(task, [nothing] * 4)["acc_norm"] == 0
    target = task_scores(encoded("target", [], [0, 0], tmp_path), [nothing, low])
    assert target == {"items": 2, "truncated": 0, "acc": 0, "acc_stderr": 0, "centred": 0, "centred_stderr": 0}


def test_one_item_has_no_standard_error(tmp_path: Path) -> None:
    scores = task_scores(encoded("choice", [1, 1], [1], tmp_path), [Likelihood(-2.0, False), Likelihood(-1.0, False)])
    assert scores == {"items": 1, "truncated": 0, "acc": 1.0, "acc_norm": 1.0, "centred": 1.0}
    assert core({"a": scores}) == {"core": 1.0}
