"""The documents that a run read, against the tokens of the loader and a search for their documents one by one."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from data_helpers import Counting
from run_helpers import SMALL, run

from gptperf.data.documents import Origin
from gptperf.data.loader import Loader
from gptperf.data.mixture import MixedTokens
from gptperf.data.read_documents import documents_read
from gptperf.data.shards import TokenSource
from gptperf.data.tokenizers import ByteTokenizer
from gptperf.data.writer import ShardWriter
from gptperf.errors import ConfigError, DataError
from gptperf.seen import __main__ as seen

EOT = Counting.eot


def write(path: Path, lengths: list[int], first: int) -> None:
    """Writes documents whose tokens are `first`, `first` + 1, ..., so that each occurs once, and `eot`."""
    with ShardWriter(
        path,
        tokenizer=Counting(),
        source="",
        val_fraction=0.5,
        split_method="",
        shard_tokens=70,  # type: ignore[arg-type]
    ) as out:
        for i, length in enumerate(lengths):
            out.add("train", np.arange(first, first + length), Origin(f"{path.name} {i % 3}", i, f"group {i % 2}"))
            first += length
        out.add("val", np.arange(50))


def by_search(
    sets: list[tuple[str, list[int], int]], source: TokenSource | MixedTokens, first: int, last: int
) -> list[tuple[str, int, int]]:
    """Returns data set, document and number of tokens by reading the batches of some iterations of 3 x 2 samples."""
    where, streams = {}, {}
    for name, lengths, value in sets:
        stream = []
        for document, length in enumerate(lengths):
            for _ in range(length):
                where[value] = (name, len(stream))
                stream.append(document)
                value += 1
            stream.append(document)  # eot
        streams[name] = stream
    totals: dict[tuple[str, int], int] = {}
    with Loader(source, block_size=16, batch_size=3, micro_batches=2, seed=5, start_step=first) as loader:
        for inputs, targets in itertools.islice(loader, 2 * (last - first)):
            for row in np.concatenate([inputs.numpy(), targets.numpy()[:, -1:]], 1).tolist():
                j, token = next((j, token) for j, token in enumerate(row) if token != EOT)
                name, position = where[token]
                for document in streams[name][position - j : position - j + len(row)]:
                    totals[name, document] = totals.get((name, document), 0) + 1
    return [(*key, count) for key, count in totals.items()]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mixed", [False, True])
def test_documents_are_those_of_the_tokens(mixed: bool, seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    short, long = (rng.integers(0, most, 60).tolist() for most in (9, 80))  # empty documents, and some of many samples
    sets = [("a", [*short, *long], 0), ("b", [*long[:20], 40, *short], 500_000)][: 1 + mixed]
    for name, lengths, first in sets:
        write(tmp_path / name, lengths, first)
    sources = [TokenSource.open(tmp_path / name, "train") for name, _, _ in sets]
    source = MixedTokens(sources, [0.75, 0.25]) if mixed else sources[0]
    for first, last in ((0, 1), (3, 5), (0, 90)):  # 90 iterations are more than an epoch
        found = documents_read(source, block_size=16, seed=5, first=first * 6, last=last * 6)
        assert [(doc.dataset, doc.origin.offset, doc.tokens) for doc in found] == by_search(sets, source, first, last)
        for doc in found:
            i = doc.origin.offset
            assert doc.origin == Origin(f"{doc.dataset} {i % 3}", i, f"group {i % 2}")


def test_chunks_of_samples_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", [5, 50, 0, 7] * 20, 0)
    with TokenSource.open(tmp_path / "a", "train") as source:
        whole = documents_read(source, block_size=16, seed=5, first=10, last=200)
        monkeypatch.setattr("gptperf.data.read_documents._CHUNK", 7)
        assert documents_read(source, block_size=16, seed=5, first=10, last=200) == whole


def write_texts(path: Path, count: int) -> None:
    with ShardWriter(path, tokenizer=ByteTokenizer(), source="", val_fraction=0.5, split_method="") as out:
        for split, i in itertools.product(("train", "val"), range(count)):
            out.add(split, ByteTokenizer().encode(f"{path.name} {i} " * (1 + i % 7)), Origin("file", i))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of 4 iterations on a mixture of many documents."""
    folder = tmp_path_factory.mktemp("seen")
    for name in ("web", "code"):
        write_texts(folder / "data" / name, 600)
    (folder / "small.toml").write_text(SMALL)
    flags = ["--max_iters=4", "--sample_tokens=0", "--dataset=web:1,code:1"]
    assert run(folder, folder / "out", *flags) == 0
    return folder


def test_the_command_on_a_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def read(iterations: str) -> dict[str, int]:
        assert seen.main([str(trained / "out"), iterations, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert sum(document["tokens"] for document in found["documents"]) == found["tokens"] == found["samples"] * 33
        return {f"{one['dataset']} {one['source']} {one['offset']}": one["tokens"] for one in found["documents"]}

    capsys.readouterr()
    whole, parts = read("0:4"), [read("0:1"), read("1:4")]
    assert list(whole) == list(dict.fromkeys([*parts[0], *parts[1]]))
    assert whole == {key: sum(part.get(key, 0) for part in parts) for key in whole}
    assert seen.main([str(trained / "out"), "2:3"]) == 0
    printed = capsys.readouterr().out
    assert "iterations 3 to 3" in printed
    assert len(printed.splitlines()) == 3 + len(read("2:3"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["3:3"], "found '3:3', wanted A:B with A below B"),
        (["5"], "found '5', wanted A:B with A below B; nearest: 4:5"),
        (["2:1"], "found '2:1', wanted A:B with A below B; nearest: 1:2"),
        (["x"], "found 'x', wanted A:B with A below B"),
        (["2:9"], "found 4 iterations, wanted 2:9; nearest: 2:4"),
        (["7:9"], "found 4 iterations, wanted 7:9; nearest: 3:4"),
    ],
)
def test_wrong_iterations(argv: list[str], message: str, trained: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        seen.main([str(trained / "out"), *argv])


def test_other_data_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no data set 'web'"):
        seen.main([str(trained / "out"), "0:1", f"--data_dir={tmp_path}"])
    for name in ("web", "code"):
        write_texts(tmp_path / name, 500)
    with pytest.raises(DataError, match=r"found the fingerprint \w{12}, wanted \w{12} of the data that the run"):
        seen.main([str(trained / "out"), "0:1", f"--data_dir={tmp_path}"])


@pytest.mark.parametrize("damage", ['"seed": "x"', '"seed": 1.5', '"dataset": 3'])
def test_a_damaged_log(damage: str, trained: Path, tmp_path: Path) -> None:
    (path,) = (trained / "out").glob("run_*.json")
    log = json.loads(path.read_text())
    key, value = next(iter(json.loads(f"{{{damage}}}").items()))
    log["config"]["data" if key == "dataset" else "train"][key] = value
    (tmp_path / "run_x.json").write_text(json.dumps(log))
    with pytest.raises(DataError, match=f"found .*{key if key == 'dataset' else value}.*in the configuration"):
        seen.main([str(tmp_path / "run_x.json"), "0:1"])
