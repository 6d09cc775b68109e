"""Preparation from the network: tiny Shakespeare from a server in the test, Hugging Face with a stand-in package."""

import hashlib
import http.server
import json
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from data_helpers import TEXTS, documents, write_jsonl

from gptperf.data import sources
from gptperf.data.format import read_manifest
from gptperf.data.prepare import prepare
from gptperf.errors import DataError, DeviceError


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# Shakespeare, from a server of this machine.


@pytest.fixture
def serve() -> Iterator[Callable[[bytes, int], str]]:
    servers = []

    def start(content: bytes, status: int = 200) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/input.txt"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_shakespeare(serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 20
    monkeypatch.setattr(sources, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    path = prepare("shakespeare", shakespeare_url=serve(text), quiet=True)
    assert path == Path("data/shakespeare")
    assert documents(path, "train") + documents(path, "val") == [
        text[: int(len(text) * 0.9)],
        text[int(len(text) * 0.9) :],
    ]
    # The download is kept: again, without a network.
    prepare("shakespeare", shakespeare_url="http://127.0.0.1:1/", overwrite=True, quiet=True)


@pytest.mark.parametrize("status", [200, 404])
def test_shakespeare_that_is_not_shakespeare(serve: Callable[..., str], status: int) -> None:
    url = serve(b"<html>please log in</html>", status)
    with pytest.raises(DataError, match=r"python -m gptperf.prepare PATH --name=shakespeare"):
        prepare("shakespeare", shakespeare_url=url, quiet=True)
    assert list(Path("data").iterdir()) == []


def test_shakespeare_offline() -> None:
    with pytest.raises(DataError, match=r"cannot download .* python -m gptperf.prepare PATH --name=shakespeare"):
        prepare("shakespeare", shakespeare_url="http://127.0.0.1:1/", quiet=True)


# Hugging Face, with a stand-in for the package.


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    module = types.ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.mark.parametrize(
    ("what", "name", "repo", "config"),
    [
        ("openwebtext", "openwebtext", "Skylion007/openwebtext", None),
        ("fineweb_edu", "fineweb_edu", "HuggingFaceFW/fineweb-edu", "sample-10BT"),
        ("slimpajama_627b", "slimpajama_627b", "cerebras/SlimPajama-627B", None),
        ("hf:me/my-set", "my-set", "me/my-set", None),
        ("hf:me/my-set:en", "my-set", "me/my-set", "en"),
    ],
)
def test_hub(monkeypatch: pytest.MonkeyPatch, what: str, name: str, repo: str, config: str | None) -> None:
    calls = []

    def load(*args: Any, **kwargs: Any) -> Iterator[dict[str, str]]:
        calls.append((args, kwargs))
        return ({"text": text} for text in TEXTS)

    fake_datasets(monkeypatch, load)
    path = prepare(what, val_fraction=0.1, quiet=True)
    assert path == Path("data") / name
    assert calls == [((repo, config), {"split": "train", "streaming": True})]
    assert sorted(documents(path, "train") + documents(path, "val")) == sorted(text.encode() for text in TEXTS)
    assert repo in read_manifest(path).source


def test_hub_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DeviceError, match=r"pip install 'gptperf\[hf\]'"):
        prepare("openwebtext", quiet=True)
    assert list(Path("data").iterdir()) == []


def test_hub_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no route\nmore")

    fake_datasets(monkeypatch, offline)
    with pytest.raises(DataError, match=r"cannot be read \(ConnectionError: no route\)"):
        prepare("hf:me/my-set", quiet=True)
    fake_datasets(monkeypatch, lambda *args, **kwargs: iter([{"content": "a"}, {"content": "b"}]))
    with pytest.raises(DataError, match=r"my-set: found no text in the field 'text'; its fields are content.*_field"):
        prepare("hf:me/my-set", quiet=True)
    with pytest.raises(DataError, match="wanted hf:REPO"):
        prepare("hf:", quiet=True)

    def compressed(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("Compression type zstd not supported")

    fake_datasets(monkeypatch, compressed)
    with pytest.raises(DeviceError, match=r"zstd not supported: pip install 'gptperf\[hf\]'"):
        prepare("slimpajama_627b", quiet=True)


def test_another_split_and_field(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(*args: Any, **kwargs: Any) -> Iterator[dict[str, str]]:
        calls.append(kwargs["split"])
        return ({"content": text, "text": "not this"} for text in TEXTS)

    fake_datasets(monkeypatch, load)
    path = prepare("hf:me/my-set:en", split="dev", text_field="content", val_fraction=0.1, quiet=True)
    assert calls == ["dev"]
    assert sorted(documents(path, "train") + documents(path, "val")) == sorted(text.encode() for text in TEXTS)
    assert read_manifest(path).source == "Hugging Face me/my-set, en, dev"
    Path("lines.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in TEXTS))
    path = prepare("lines.jsonl", text_field="content", val_fraction=0.1, quiet=True)
    assert sorted(documents(path, "train") + documents(path, "val")) == sorted(text.encode() for text in TEXTS)
    with pytest.raises(DataError, match=r"--split: found 'dev', wanted none: lines\.jsonl"):
        prepare("lines.jsonl", split="dev", name="other", quiet=True)
    with pytest.raises(DataError, match="--text_field: found 'content', wanted none: python_stdlib"):
        prepare("python_stdlib", text_field="content", quiet=True)


def test_hub_with_the_real_package(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the package datasets (extra hf) is not installed")
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", TEXTS)
    path = prepare(f"hf:{tmp_path / 'set'}", val_fraction=0.1, quiet=True)
    assert sorted(documents(path, "train") + documents(path, "val")) == sorted(text.encode() for text in TEXTS)
