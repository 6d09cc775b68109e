"""What a value of a higher layer changes in lower layers, besides the value of its own key.

The layers of a configuration are the defaults, then each file, then the command line. A value is never changed because
of a value in its own layer or in a lower one. Each change is described by a line for the user. Loads no torch.
"""

from collections.abc import Mapping
from typing import Any

from gptperf.config.rules import RULES, Rule

__all__ = ["Layered"]

_WARMUP_SHARE = 10  # a warm-up from a lower layer is cut to this part of the run


class Layered:
    """The values of all keys, and where they come from.

    Args:
        defaults: key -> default; these are layer 0.
    """

    def __init__(self, defaults: Mapping[str, Any]):
        self.values = dict(defaults)
        self.origins = dict.fromkeys(defaults, "default")
        self.layers = dict.fromkeys(defaults, 0)
        self.changes: dict[str, str] = {}
        """Key -> a line that says how `adjust` changed its value."""

    def put(self, key: str, value: Any, origin: str, layer: int) -> None:
        """Overrides a value."""
        self.values[key], self.origins[key], self.layers[key] = value, origin, layer

    def adjust(self, ignore: frozenset[str]) -> None:
        """Shortens the schedule of a shorter run, and lets a value yield to one of a higher layer that contradicts it.

        Args:
            ignore: keys that have a mistake; rules on them are skipped.
        """
        if not ignore & {"max_iters", "warmup_iters", "lr_decay_iters"}:
            self._shorten_schedule()
        for rule in RULES:
            if not ignore & set(rule.keys):
                self._yield(rule)

    def _shorten_schedule(self) -> None:
        """Ends a decay with the run, and cuts a warm-up to a tenth, where they come from below the run's length."""
        values, layers = self.values, self.layers
        run, decay = values["max_iters"], values["lr_decay_iters"]
        if decay is not None and decay > run and layers["lr_decay_iters"] < layers["max_iters"]:
            why = f"the decay ends with the run, max_iters = {run} ({self.origins['max_iters']})"
            self._change("lr_decay_iters", None, f"{why}, not at {decay}", layers["max_iters"])
        by = "max_iters" if values["lr_decay_iters"] is None or values["lr_decay_iters"] > run else "lr_decay_iters"
        most = values[by] // _WARMUP_SHARE
        if values["warmup_iters"] > most and layers["warmup_iters"] < layers[by]:
            why = f"cut to a tenth of {by} = {values[by]} ({self.origins[by]})"
            self._change("warmup_iters", most, f"{why}, it was {values['warmup_iters']}", layers[by])

    def _yield(self, rule: Rule) -> None:
        """Changes the key of the lowest layer that may yield, if the values of a rule contradict each other."""
        top = max(self.layers[key] for key in rule.keys)
        if rule.check(self.values) is None:
            return
        for key in sorted(rule.yields, key=self.layers.__getitem__):
            value = rule.yields[key](self.values)
            if self.layers[key] < top and rule.check({**self.values, key: value}) is None:
                winners = [name for name in rule.keys if self.layers[name] == top]
                over = " and ".join(f"{name} = {shown(self.values[name])}" for name in winners)
                was = shown(self.values[key])
                self._change(key, value, f"yields to {over} ({self.origins[winners[0]]}), it was {was}", top)
                return

    def _change(self, key: str, value: Any, why: str, layer: int) -> None:
        origin = f"{self.origins[key]}; {why}"
        self.changes[key] = f"{key} = {shown(value)}: {why} ({self.origins[key]})"
        self.put(key, value, origin, layer)


def shown(value: Any) -> str:
    """Returns a value as messages show it."""
    if value is None:
        return "(none)"
    return str(value).lower() if isinstance(value, bool) else repr(value)
