"""The cache of measured ceilings returns what was stored under the same conditions, and nothing else."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ceiling_helpers import ARGV, GPT, LLAMA, WHERE, measured

from gptperf.config import command_line
from gptperf.errors import DiskError
from gptperf.hardware import ceiling_cache
from gptperf.hardware.ceilings import Ceilings


def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **changed: Any) -> tuple[Ceilings, Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result, path = measured(**changed), ceiling_cache.cache_path(LLAMA, 4, *WHERE)
    ceiling_cache.save(result, path)
    return result, path


def loaded(*where: Any, **more: Any) -> tuple[Ceilings | None, list[str]]:
    said: list[str] = []
    return ceiling_cache.load(*where, **more, say=said.append), said


def test_what_is_kept_comes_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result, path = kept(monkeypatch, tmp_path)
    assert path.parent == tmp_path / "gptperf" / "ceilings"
    assert path.name.startswith("NVIDIA_H200-bfloat16-driver_575.57.08-torch_2.11.0+cu130-")
    assert loaded(LLAMA, 4, *WHERE, power_cap_w=700.0) == (result, [])
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary one is left
    ceiling_cache.save(dataclasses.replace(result, gemm_flop_s=1.0), path)
    again, _ = loaded(LLAMA, 4, *WHERE)
    assert again is not None
    assert again.gemm_flop_s == 1.0


def test_whatever_changes_the_ceilings_has_a_file_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wheres: list[Any] = [
        (LLAMA, 4, *WHERE),
        (LLAMA, 5, *WHERE),
        (GPT, 4, *WHERE),
        (dataclasses.replace(LLAMA, n_kv_head=4), 4, *WHERE),
        (dataclasses.replace(LLAMA, attention_backend="manual"), 4, *WHERE),
        (LLAMA, 4, "float16", *WHERE[1:]),
        (LLAMA, 4, "bfloat16", "NVIDIA H200 NVL", *WHERE[2:]),
        (LLAMA, 4, *WHERE[:2], "580.1", WHERE[3]),
        (LLAMA, 4, *WHERE[:3], "2.12.0"),
    ]
    assert len({ceiling_cache.cache_path(*where) for where in wheres}) == len(wheres)
    same = dataclasses.replace(LLAMA, dropout=0.1, norm_eps=1e-6)
    assert ceiling_cache.cache_path(same, 4, *WHERE) == ceiling_cache.cache_path(LLAMA, 4, *WHERE)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):  # a relative one is not to be used, says the XDG specification
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert ceiling_cache.cache_path(LLAMA, 4, *WHERE).parent == tmp_path / ".cache" / "gptperf" / "ceilings"
    assert ceiling_cache.cache_path(LLAMA, 4, "bfloat16", "../../etc/x", None, "/").parent.name == "ceilings"


def damages(data: bytes) -> dict[str, bytes]:
    page = json.loads(data)
    other_version = page | {"version": 0}
    fewer = page["ceilings"].copy()
    del fewer["protocol"]
    return {
        "cut": data[: len(data) // 2],
        "empty": b"",
        "bit": data.replace(b'"gemm_square_flop_s": 69', b'"gemm_square_flop_s": 99', 1),
        "not utf-8": b"\xff" + data,
        "list": b"[]",
        "version": json.dumps(other_version).encode(),
        "field": json.dumps({"version": 1, "sha256": ceiling_cache._digest(fewer), "ceilings": fewer}).encode(),
    }


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "not utf-8", "list", "version", "field"])
def test_a_corrupt_file_is_skipped_with_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str) -> None:
    _, path = kept(monkeypatch, tmp_path)
    data = path.read_bytes()
    changed = damages(data)[damage]
    assert changed != data
    path.write_bytes(changed)
    found, said = loaded(LLAMA, 4, *WHERE)
    assert found is None
    assert len(said) == 1
    assert said[0].startswith(f"{path}: not used, the ceilings must be measured again: ")


def test_a_link_and_a_strangers_file_are_skipped_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, path = kept(monkeypatch, tmp_path)
    stranger = ceiling_cache.cache_path(GPT, 4, *WHERE)
    path.rename(stranger)
    found, said = loaded(GPT, 4, *WHERE)
    assert (found, len(said)) == (None, 1)
    assert "not used: found ceilings of" in said[0]
    path.symlink_to(stranger)
    found, said = loaded(LLAMA, 4, *WHERE)
    assert (found, len(said)) == (None, 1)


def test_another_power_cap_is_another_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result, _ = kept(monkeypatch, tmp_path)
    assert loaded(LLAMA, 4, *WHERE, power_cap_w=700.4)[0] == result
    found, said = loaded(LLAMA, 4, *WHERE, power_cap_w=500.0)
    assert found is None
    assert "measured at 700 W, and the power cap is 500 W now" in said[0]
    assert loaded(LLAMA, 4, *WHERE, power_cap_w=None)[0] == result


def test_no_file_is_no_ceilings_and_no_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert loaded(LLAMA, 4, *WHERE) == (None, [])


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be written"):
        ceiling_cache.save(measured(), tmp_path / "file" / "x.json")


def test_load_needs_no_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept(monkeypatch, tmp_path)
    config = command_line.resolve(ARGV).config
    ceiling_cache.save(measured(config.model), ceiling_cache.cache_path(config.model, 4, *WHERE))
    code = (
        "import sys\nfrom gptperf.config import command_line\nfrom gptperf.hardware import ceiling_cache\n"
        f"model = command_line.resolve({ARGV!r}).config.model\n"
        f"found = ceiling_cache.load(model, 4, *{WHERE!r})\n"
        "sys.exit(found is None or 'torch' in sys.modules)"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
