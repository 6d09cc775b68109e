"""The generated tables of the user's guide: `python tests/helpers/guide_tables.py` writes them."""

import ast
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

from gptperf.config import KEYS, command_line
from gptperf.hardware import GPUS
from gptperf.plan import find_gpu, plan
from gptperf.plan.memory import STRATEGIES
from gptperf.plan.text import STRATEGY_NAMES

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "gptperf" / "GUIDE.md"
_DTYPES = ("bfloat16", "float16", "fp8")


def _docstrings() -> dict[str, str]:
    """The docstring below each key in `config/sections.py`."""
    found = {}
    for node in ast.parse((ROOT / "gptperf" / "config" / "sections.py").read_text()).body:
        body = node.body if isinstance(node, ast.ClassDef) else []
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found


def key_table() -> str:
    """Every key with its default, as a line of TOML, and its meaning: two columns, because a phone shows no third."""
    lines = ["| key and default | meaning |", "| --- | --- |"]
    texts = _docstrings()
    for name, key in KEYS.items():
        default = "" if key.default is None else f" = {json.dumps(key.default)}"
        lines.append(f"| `{name}{default}` | {texts[name].replace('|', '/')} |")
    return "\n".join(lines)


def gpu_table() -> str:
    """Peaks, memory and bandwidth of every GPU, with the documents that they are from."""
    lines = ["Dense peaks in TFLOP/s; `-` is a dtype that the GPU does not have.", ""]
    lines += ["| GPU | bf16 | fp16 | fp8 | memory, GB | bandwidth, TB/s | source |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | --- |"]
    for gpu in GPUS:
        rates = " | ".join(f"{gpu.dense_tflops[dtype]:g}" if dtype in gpu.dense_tflops else "-" for dtype in _DTYPES)
        lines.append(f"| {gpu.name} | {rates} | {gpu.memory_gb:g} | {gpu.hbm_byte_s / 1e12:.3f} | {gpu.source} |")
    return "\n".join(lines)


def memory_table() -> str:
    """Memory of a GPU by strategy and number of GPUs, as planned."""
    gpu, counts = find_gpu("H200"), (1, 2, 4, 8)
    lines = ["Planned peak memory of one H200 in GB for `llama_1.36b` (8 x 2048 tokens per micro-batch):", ""]
    lines += ["| strategy | " + " | ".join("1 GPU" if n == 1 else f"{n} GPUs" for n in counts) + " |"]
    lines += ["| --- |" + " ---: |" * len(counts)]
    for strategy in STRATEGIES:
        cells = []
        for count in counts:
            config = command_line.resolve(["llama_1.36b"], world_size=count).config
            cells.append(f"{plan(config, gpu, num_gpus=count, strategy=strategy).memory.total_gb:.1f}")
        lines.append(f"| {STRATEGY_NAMES[strategy]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {"All keys": key_table, "GPUs": gpu_table, "Memory by strategy": memory_table}
"""Heading of a section -> the function that makes its content."""


def section(page: str, heading: str) -> str:
    """The content of a section."""
    found = re.search(rf"^## {heading}\n\n(.*?)\n(?=\n## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert found is not None, heading
    return found[1]


if __name__ == "__main__":
    text = GUIDE.read_text()
    for title, make in TABLES.items():
        text = text.replace(f"## {title}\n\n{section(text, title)}\n", f"## {title}\n\n{make()}\n")
    GUIDE.write_text(text)
