"""The cells of the bench: what `python -m bench` measures, one result file each."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from bench.measure.cases import HOST_SHAPES, LOSS_OP, OPS
from bench.measure.models import (
    DEFAULT_VARIANT,
    MODELS,
    PLANNED,
    RIVAL_MODELS,
    SHAPES,
    SMALL,
    STARTED,
    STEP_VARIANTS,
)
from gptperf.errors import ConfigError

__all__ = ["BATCH_SIZES", "GENERATING", "MICRO", "Cell", "all_cells", "select"]

MICRO = ("loader", "config", "dispatch", "checkpoint")


@dataclass(frozen=True)
class Cell:
    """One measurement of the bench."""

    name: str
    budget_s: float
    """Estimated time on an H200, or on any machine for a cell that needs no GPU."""
    gpu: bool = True
    alone: bool = False
    """Whether the cell runs in a process of its own, so that all of the memory is free."""
    quick_s: float | None = None
    """Estimated time of the short form in `--quick`; None if the cell is not part of `--quick`."""
    needs: tuple[str, ...] = ()
    """Cells whose results this cell uses."""

    def seconds(self, quick: bool) -> float:
        """Returns the estimated time of the short or the full form."""
        return self.quick_s if quick and self.quick_s is not None else self.budget_s


_LARGE = "llama_1.36b"
_QUICK_MODEL = "gpt2_124m"
GENERATING, BATCH_SIZES = (_QUICK_MODEL, _LARGE), (1, 32)
"""Models whose generation is measured, and the numbers of prompts."""
_QUICK_MICRO_S = {"config": 10, "dispatch": 10}
_QUICK_OPS = ("ops/rms_norm/65536x768", "ops/swiglu/65536x2048")


def all_cells() -> tuple[Cell, ...]:
    """Returns every cell in the order of measurement: a cell comes after the cells that it needs."""
    cells = [Cell(f"micro/{name}", 10, gpu=False, quick_s=_QUICK_MICRO_S.get(name)) for name in MICRO]
    cells.append(Cell("loader", 75, gpu=False, quick_s=12))
    for model in MODELS:
        quick, large = model == _QUICK_MODEL, model == _LARGE
        ceilings = Cell(f"ceilings/{model}", 60, alone=True, quick_s=40 if quick else None)
        cells.append(ceilings)
        for variant in (STEP_VARIANTS[0], DEFAULT_VARIANT) if model in SMALL else STEP_VARIANTS:
            seconds = (90 if large else 45) if "compiled" in variant else (60 if large else 35)
            # `--quick` has no step cells: the waterfall's cell measures the same step, and compiles the model once.
            cells.append(Cell(f"step/{model}/{variant}", seconds, alone=True, needs=(ceilings.name,)))
        seconds = 70 if large else 40
        quick_s = 45 if quick else None
        cells.append(Cell(f"waterfall/{model}", seconds, alone=True, quick_s=quick_s, needs=(ceilings.name,)))
    cells += [Cell(f"generation/{model}/{rows}", 20, alone=True) for model in GENERATING for rows in BATCH_SIZES]
    cells += [Cell(f"start/{model}", 200 if model == _LARGE else 60, alone=True) for model in STARTED]
    for model in RIVAL_MODELS:
        cells += [Cell(f"rivals/{model}/{shape}", 240 if model == _LARGE else 120, alone=True) for shape in SHAPES]
    cells.append(Cell(f"monitor/{_LARGE}", 90, alone=True))
    cells += [Cell(f"plan/{name}", 60 if _LARGE in name else 45, alone=True) for name in PLANNED]
    for op, row in OPS.items():
        for shape in row.shapes:
            name = f"ops/{op}/{'x'.join(map(str, shape))}"
            seconds = 20 if op == LOSS_OP else 8
            cells.append(Cell(name, seconds, quick_s=15 if name in _QUICK_OPS else None))
    cells += [Cell(f"errors/{op}", 10, gpu=False) for op in OPS if not op.endswith("_recompute")]
    cells += [Cell(f"host/{op}", 12) for op in HOST_SHAPES]
    return tuple(cells)


def select(only: Sequence[str], quick: bool) -> list[Cell]:
    """Selects cells by name, together with the cells that they need.

    Args:
        only: Names or their beginnings up to a slash, such as "step/llama_1.36b"; empty selects all cells.
        quick: Select only the cells of `--quick`, unless `only` names some.

    Raises:
        ConfigError: No cell begins with one of the names.
    """
    cells = all_cells()
    if not only:
        return [cell for cell in cells if not quick or cell.quick_s is not None]
    chosen: set[str] = set()
    for wanted in only:
        found = [cell for cell in cells if f"{cell.name}/".startswith(f"{wanted.rstrip('/')}/")]
        if not found:
            names = {"/".join(cell.name.split("/")[:depth]) for cell in cells for depth in (1, 2, 3)}
            near = difflib.get_close_matches(wanted, sorted(names), 1)
            kinds = ", ".join(dict.fromkeys(cell.name.partition("/")[0] for cell in cells))
            hint = f"; nearest: {near[0]}" if near else ""
            raise ConfigError(f"command line: only: found {wanted!r}, wanted a cell or the start of one: {kinds}{hint}")
        chosen |= {name for cell in found for name in (cell.name, *cell.needs)}
    return [cell for cell in cells if cell.name in chosen]
