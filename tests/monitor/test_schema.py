"""The log of real runs matches its JSON Schema, and within a version no field disappears or changes its type."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from run_helpers import ROOT, run, run_log

from gptperf.errors import DataError
from gptperf.monitor.events import SCHEMA_VERSION, RunLog, StartupInfo, Summary
from gptperf.monitor.journal import Journal, write_json
from gptperf.monitor.schema import read_run, schema

# Field -> type in every version of the log; "!" after a name means that the field is required. A new field of the
# newest version needs no change here. A field that is removed or changes its type needs a new SCHEMA_VERSION and a new
# entry.
FROZEN: dict[int, dict[str, dict[str, str]]] = {
    1: {
        "RunLog": {
            "schema_version!": "integer",
            "run_name!": "string",
            "start_time!": "string",
            "config!": "object",
            "startup_info!": "object",
            "training_iterations!": "[Iteration]",
            "eval_steps!": "[Eval]",
            "checkpoints!": "[Checkpoint]",
            "profiles!": "[Profile]",
            "messages!": "[Message]",
            "resumes!": "[Resume]",
            "summary!": "object",
            "damaged_lines!": "integer",
            "ignored_events!": "integer",
        },
        "Checkpoint": {"iter!": "integer", "path!": "string", "val_loss": "number|null", "time_ms": "number"},
        "Eval": {"iter!": "integer", "val_loss!": "number|null", "best_val_loss": "number|null", "time_ms": "number"},
        "Gradients": {
            "global_norm": "number|null",
            "grad_mean": "number|null",
            "grad_std": "number|null",
            "grad_min": "number|null",
            "grad_max": "number|null",
            "zero_share": "number|null",
            "non_finite": "integer",
            "layer_norms": "{number|null}",
            "component_norms": "{number|null}",
            "histogram": "{[number]}",
            "update_ratios": "{number|null}",
        },
        "Iteration": {
            "iter!": "integer",
            "loss!": "number|null",
            "time_ms!": "number",
            "data_wait_ms": "number",
            "lr": "number",
            "tokens": "integer",
            "mfu": "Mfu",
            "memory": "Memory",
            "gradients": "Gradients",
            "stability": "Stability",
            "loss_scale": "number",
        },
        "Memory": {
            "allocated_gb": "number",
            "peak_gb": "number",
            "reserved_gb": "number",
            "rss_gb": "number",
            "peak_rss_gb": "number",
        },
        "Message": {"level!": "string", "text!": "string", "iter": "integer"},
        "Mfu": {
            "mfu_percent": "number",
            "achieved_tflops": "number",
            "hardware_peak_tflops": "number",
            "tokens_per_sec": "number",
            "flops_per_token": "number",
            "convention": "string",
            "peak_dtype": "string",
            "peak_basis": "string",
            "hfu_percent": "number",
            "of_ceiling_percent": "number",
        },
        "Profile": {
            "iter!": "integer",
            "trace!": "string",
            "steps": "integer",
            "step_ms": "number",
            "parts_ms": "{number}",
            "waterfall": "{number}|null",
            "mfu_percent": "number|null",
            "kernels": "[object]",
        },
        "Resume": {"iter!": "integer", "time!": "string"},
        "Stability": {
            "window!": "integer",
            "loss_mean": "number|null",
            "loss_variance": "number|null",
            "spike": "boolean",
            "plateau": "boolean",
            "non_finite": "integer",
        },
    }
}


def fields(of: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Returns class -> field, with "!" if it is required -> its type, without descriptions."""
    found = {}
    for name, table in {"RunLog": of, **of["$defs"]}.items():
        found[name] = {
            field + ("!" if field in table["required"] else ""): _type(kind)
            for field, kind in table["properties"].items()
        }
    return found


def _type(kind: dict[str, Any]) -> str:
    """Returns the type of a field in short: names with "|", "[...]" for a list, "{...}" for a mapping."""
    if "$ref" in kind:
        return kind["$ref"].rpartition("/")[2]
    if "anyOf" in kind:
        return "|".join(map(_type, kind["anyOf"]))
    if kind.get("type") == "array":
        return f"[{_type(kind['items'])}]"
    if "additionalProperties" in kind:
        return f"{{{_type(kind['additionalProperties'])}}}"
    name = kind.get("type", "any")
    return name if isinstance(name, str) else "|".join(name)


def broken(now: dict[str, dict[str, str]], then: dict[str, dict[str, str]]) -> list[str]:
    """Returns the fields that a reader of `then` would not find in `now`."""
    lines = []
    for name, frozen in then.items():
        found = now.get(name, {})
        for field, kind in frozen.items():
            have = found.get(field, found.get(field + "!"))
            if have != kind:
                lines.append(f"{name}.{field}: {kind} -> {have}")
    return lines


def test_no_field_is_lost_or_retyped_without_a_new_version() -> None:
    assert SCHEMA_VERSION in FROZEN, "add the fields of the new version: print(fields(schema()))"
    lines = broken(fields(schema()), FROZEN[SCHEMA_VERSION])
    assert not lines, "raise SCHEMA_VERSION, or keep: " + "; ".join(lines)


@pytest.mark.parametrize("change", ["removed", "retyped", "optional", "class", "added", "always there"])
def test_such_a_change_is_noticed_and_an_addition_is_not(change: str) -> None:
    now = copy.deepcopy(FROZEN[1])
    if change == "removed":
        del now["Mfu"]["mfu_percent"]
    elif change == "retyped":
        now["Iteration"]["tokens"] = "number"
    elif change == "optional":
        now["Eval"]["val_loss"] = now["Eval"].pop("val_loss!")
    elif change == "class":
        del now["Profile"]
    elif change == "added":
        now["Mfu"]["joules_per_token"] = "number"
    else:
        now["Iteration"]["lr!"] = now["Iteration"].pop("lr")
    assert bool(broken(now, FROZEN[1])) == (change not in ("added", "always there"))


@pytest.fixture(scope="module")
def out(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was resumed."""
    out = tmp_path_factory.mktemp("run")
    assert run(corpus, out, "--max_iters=10", "--dtype=float16") == 0
    assert run(corpus, out, "--max_iters=12", "--dtype=float16", "--init_from=resume") == 0
    return out


def test_real_runs_are_valid(out: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs the package jsonschema")
    validator = jsonschema.Draft202012Validator
    validator.check_schema(schema())
    log = run_log(out)
    assert all(log[key] for key in ("training_iterations", "eval_steps", "checkpoints", "resumes", "summary"))
    assert [error.message for error in validator(schema()).iter_errors(log)] == []


def test_every_field_of_a_log_is_declared(out: Path) -> None:
    """The records of a real run, nested ones included, have no field that `gptperf.monitor.events` does not declare."""
    log, described = run_log(out), schema()

    def undeclared(value: Any, kind: dict[str, Any], where: str) -> list[str]:
        if "$ref" in kind:
            kind = described["$defs"][kind["$ref"].rpartition("/")[2]]
        if kind.get("type") == "array":
            return [line for entry in value for line in undeclared(entry, kind["items"], where)]
        fields = kind.get("properties")
        if fields is None:
            return []
        extra = [f"{where}.{key}" for key in value if key not in fields]
        return extra + [line for key in value if key in fields for line in undeclared(value[key], fields[key], key)]

    assert undeclared(log, described, "log") == []
    assert log["startup_info"].keys() <= StartupInfo.__annotations__.keys()
    assert log["summary"].keys() <= Summary.__annotations__.keys()


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("schema_version",), 2),
        (("training_iterations", 0, "loss"), "1.5"),
        (("training_iterations", 0, "iter"), 1.5),
        (("training_iterations", 1, "mfu", "tokens_per_sec"), None),
        (("training_iterations", 0, "gradients", "global_norm"), True),
        (("eval_steps", 0, "val_loss"), ...),
        (("resumes", 0, "iter"), None),
        (("summary",), []),
        (("messages",), [{"level": "info"}]),
    ],
)
def test_a_damaged_log_is_not_valid(where: tuple[str | int, ...], value: Any, out: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs the package jsonschema")
    log: Any = run_log(out)
    at = log
    for key in where[:-1]:
        at = at[key]
    if value is ...:
        del at[where[-1]]
    else:
        at[where[-1]] = value
    assert not jsonschema.Draft202012Validator(schema()).is_valid(log)


def test_an_empty_journal_is_valid(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs the package jsonschema")
    with Journal(tmp_path, "run_20250103_143022") as journal:
        pass
    jsonschema.Draft202012Validator(schema()).validate(json.loads(write_json(journal.path).read_text()))


def test_the_reader_refuses_other_versions(out: Path, tmp_path: Path) -> None:
    (path,) = out.glob("run_*.json")
    log = json.loads(path.read_text())
    assert read_run(path) == log
    assert log["schema_version"] == SCHEMA_VERSION
    copy_of = tmp_path / "run_20250103_143022.json"
    newer = SCHEMA_VERSION + 1
    for found, text in (
        (newer, f"schema_version: found {newer}, wanted {SCHEMA_VERSION}; a newer gptperf wrote it"),
        (0, f"schema_version: found 0, wanted {SCHEMA_VERSION}"),
        ("1", f"schema_version: found '1', wanted {SCHEMA_VERSION}"),
        (True, "schema_version: found True"),
    ):
        copy_of.write_text(json.dumps(log | {"schema_version": found}))
        with pytest.raises(DataError, match=text):
            read_run(copy_of)
    for data, text in (
        (b"{}", "found no schema_version; wanted the JSON file of a run"),
        (b"[]", "found no schema_version"),
        (b'{"schema_version": 1', "cannot be read"),
        (b"\xff", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (json.dumps({"schema_version": SCHEMA_VERSION, "summary": {}}).encode(), "found no checkpoints, config"),
    ):
        copy_of.write_bytes(data)
        with pytest.raises(DataError, match=text):
            read_run(copy_of)
    with pytest.raises(DataError, match="cannot be read"):
        read_run(tmp_path / "absent.json")


def test_the_command_prints_the_schema_with_descriptions() -> None:
    command = [sys.executable, "-m", "gptperf.monitor.schema"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    printed = json.loads(done.stdout)
    assert printed == schema()
    assert printed["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert printed["$id"].endswith(f":{SCHEMA_VERSION}")
    assert printed["properties"].keys() == RunLog.__annotations__.keys()
    iteration = printed["$defs"]["Iteration"]
    assert iteration["description"].startswith("Event `iteration`")
    assert iteration["properties"]["loss"]["type"] == ["number", "null"]
    assert iteration["properties"]["loss"]["description"] == "Mean loss over the tokens of the step, in nats."
    assert iteration["required"] == ["iter", "loss", "time_ms"]
