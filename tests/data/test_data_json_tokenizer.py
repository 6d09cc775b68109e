"""Tokenizers of Hugging Face: any tokenizer.json, the end of a document, names on the hub."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tokenizer_helpers import AS_IS, CORPUS, END, described, from_json, restored

from gptperf.data.json_tokenizer import JsonTokenizer
from gptperf.data.tokenizers import load_tokenizer
from gptperf.errors import DataError, DeviceError

tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers (extra hf) is not installed")

# tokenizer.json.


def model_of(kind: str) -> Any:
    """A tokenizer of the library, without an added token."""
    models, pre = tokenizers.models, tokenizers.pre_tokenizers
    words = {word: i for i, word in enumerate(["[UNK]", "the", "isn", "##t", "</s>", "ids", "<", "s", "/", ">", END])}
    if kind == "wordlevel":
        made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        made.pre_tokenizer = pre.WhitespaceSplit()
    elif kind == "wordpiece":
        made = tokenizers.Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
        made.pre_tokenizer = pre.Whitespace()
    else:
        scores = [("<unk>", 0.0), (END, 0.0), ("\u2581", -1.0), ("\u2581the", -1.5), ("s", -2.0), ("i", -2.0)]
        made = tokenizers.Tokenizer(models.Unigram([*scores, ("d", -2.0)], unk_id=0, byte_fallback=False))
        made.pre_tokenizer = pre.Metaspace()
        made.decoder = tokenizers.decoders.Metaspace()
    return made


@pytest.mark.parametrize("kind", ["wordlevel", "wordpiece", "unigram"])
def test_any_model_gives_the_ids_of_the_library(kind: str) -> None:
    theirs = model_of(kind)
    ours = from_json(json.loads(theirs.to_str()))
    for text in ("the ids", "isnt the", "the  ids\n the"):
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids
    again = restored(ours)
    assert again.encode("the ids").tolist() == ours.encode("the ids").tolist()
    assert (again.files, again.eot, again.vocab_size) == (ours.files, ours.eot, ours.vocab_size)
    # The model has the text of the end of a document as a word of its own.
    assert ours.eot not in ours.encode(f"the {END} ids {END}")


def test_special_tokens_in_a_document_are_plain_text(trained: JsonTokenizer) -> None:
    content = described(trained)
    for special in (False, True):
        content["added_tokens"] = [{"id": 399, "content": END, "special": special, **AS_IS}]
        content["added_tokens"] += [{"id": 400, "content": "<|user|>", "special": True, **AS_IS}]
        tokenizer = from_json(content)
        ids = tokenizer.encode(f"a{END}b<|user|>{END}{END}")
        assert not {399, 400} & set(ids.tolist())
        assert tokenizer.decode(ids) == f"a{END}b<|user|>{END}{END}"
        assert tokenizer.decode([399, 12345, 400]) == f"{END}<|user|>"


def test_what_adds_or_drops_ids_is_not_used(trained: JsonTokenizer) -> None:
    changed = tokenizers.Tokenizer.from_str(trained.files["tokenizer.json"].decode())
    changed.enable_truncation(3)
    changed.enable_padding(length=50)
    changed.post_processor = tokenizers.processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 399)])
    content = json.loads(changed.to_str())
    content["model"]["dropout"] = 0.9
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    text = CORPUS[0].decode()
    assert changed.encode(text).ids != trained.encode(text).tolist()
    assert from_json(content).encode(text).tolist() == trained.encode(text).tolist()
    assert from_json(content).fingerprint == trained.fingerprint


def test_the_fingerprint_sees_what_decides_ids(trained: JsonTokenizer) -> None:
    def changed(**keys: Any) -> str:
        return from_json(described(trained) | keys).fingerprint

    vocab = described(trained)["model"]["vocab"]
    swapped = vocab | {"a": vocab["b"], "b": vocab["a"]}
    with_a_second = [*described(trained)["added_tokens"], {"id": 400, "content": "<x>", "special": False, **AS_IS}]
    prints = [
        changed(),
        changed(normalizer={"type": "NFC"}),
        changed(model=described(trained)["model"] | {"vocab": swapped}),
        changed(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}),
        changed(added_tokens=with_a_second),
        from_json(described(trained) | {"added_tokens": with_a_second}, "<x>").fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    assert prints[0] == trained.fingerprint == changed(decoder=None, truncation=None)


def test_ids_with_holes(trained: JsonTokenizer) -> None:
    content = described(trained)
    content["added_tokens"].append({"id": 1_000, "content": "<|far|>", "special": True, **AS_IS})
    tokenizer = from_json(content)
    assert (tokenizer.vocab_size, tokenizer.eot) == (1_001, 399)
    assert tokenizer.decode([1_000, 80_000, -1]) == "<|far|>"
    assert restored(tokenizer).files == tokenizer.files
    words = json.loads(model_of("wordlevel").to_str())
    words["model"]["vocab"]["ids"] = 500
    assert from_json(words).encode("ids").tolist() == [500]
    assert from_json(words).vocab_size == 501
    content["added_tokens"] = [{"id": 5, "content": END, "special": True, **AS_IS}]  # 5 is the id of another token
    with pytest.raises(DataError, match=r"gives '<\|endoftext\|>' the id 399, the file states 5"):
        from_json(content)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"model": {}}', b"\xff", b'{"model": {"vocab": {"a": "b"}}}'])
def test_a_file_that_is_no_tokenizer(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer 'x': .*(not a tokenizer\.json|cannot read it)"):
        load_tokenizer(str(tmp_path / "x.json"))


def test_paths_and_the_end_of_a_document(trained: JsonTokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    content = described(trained)
    content["added_tokens"].append({"id": 400, "content": "<stop>", "special": True, **AS_IS})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    for path in (folder, folder / "tokenizer.json"):
        found = load_tokenizer(str(path))
        assert (found.name, found.eot) == ("mine", 399)
        assert load_tokenizer(str(path), eot="<stop>").eot == 400
    for named in ("<stop>", {"content": "<stop>"}):
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
        assert load_tokenizer(str(folder)).eot == 400
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"no token '<other>', wanted --eot=TOKEN, one of <\|endoftext\|>, <stop>"):
        load_tokenizer(str(folder), eot="<other>")
    content["added_tokens"] = [{"id": 399, "content": "<stop>", "special": True, **AS_IS}]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"no token that ends a document.*--eot=TOKEN, one of <stop>"):
        load_tokenizer(str(folder))
    with pytest.raises(DataError, match=r"absent/x\.json: cannot be read.*wanted a tokenizer\.json, a folder"):
        load_tokenizer("absent/x.json")


# Names on the hub.


def test_hub(trained: JsonTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NotThereError(ValueError):
        """The repository does not have the file."""

    class OfflineError(FileNotFoundError, NotThereError):
        """Neither the cache nor the network has the file."""

    calls: list[tuple[str, str, bool]] = []
    cached: dict[str, str] = {}
    online: dict[str, str] | None = {}

    def hf_hub_download(repo: str, file: str, local_files_only: bool = False) -> str:
        calls.append((repo, file, local_files_only))
        if file in cached:
            return cached[file]
        if local_files_only or online is None:
            raise OfflineError("no route\nmore")
        if file not in online:
            raise NotThereError("404")
        return online[file]

    hub = types.ModuleType("huggingface_hub")
    hub.hf_hub_download = hf_hub_download  # type: ignore[attr-defined]
    hub.errors = types.SimpleNamespace(EntryNotFoundError=NotThereError)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    for name, content in (("tokenizer.json", trained.files["tokenizer.json"]), ("tokenizer_config.json", b"{}")):
        (tmp_path / name).write_bytes(content)
    here = {name: str(tmp_path / name) for name in ("tokenizer.json", "tokenizer_config.json")}
    with pytest.raises(DataError, match=r"'hf:me/it': found no tokenizer\.json, wanted a repository that has one"):
        load_tokenizer("hf:me/it")
    online = here
    assert load_tokenizer("hf:me/it").fingerprint == trained.fingerprint
    online = {"tokenizer.json": here["tokenizer.json"]}  # a repository without a configuration
    assert load_tokenizer("hf:me/it").name == "hf:me/it"
    online = None
    by_hand = r"by hand.*https://huggingface\.co/me/it/tree/main into FOLDER.*--tokenizer=FOLDER.*HF_ENDPOINT.*HF_HOME"
    with pytest.raises(DataError, match=rf"(?i)tokenizer\.json cannot be downloaded.*no route\).*{by_hand}"):
        load_tokenizer("hf:me/it")
    cached = {"tokenizer.json": here["tokenizer.json"]}
    with pytest.raises(DataError, match=r"tokenizer_config\.json cannot be downloaded"):
        load_tokenizer("hf:me/it")  # its configuration may name another end of a document
    assert load_tokenizer("hf:me/it", eot=END).eot == 399
    cached = here
    calls.clear()
    assert load_tokenizer("hf:me/it").eot == 399
    assert all(local for *_, local in calls)  # what is in the cache needs no network
    with pytest.raises(DataError, match="wanted hf:REPO"):
        load_tokenizer("hf:")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DeviceError, match=r"needs the package huggingface_hub.*pip install 'gptperf\[hf\]'"):
        load_tokenizer("hf:me/it")
