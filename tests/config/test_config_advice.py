"""The nearest values in error messages of the configuration lead to a configuration that is right."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from gptperf.config import command_line
from gptperf.errors import ConfigError

NEAREST = re.compile(r"nearest(?: (\w+))?: (?:(\w+) = )?'?([\w./:-]+)'?")
VALUES = {
    "n_embd": st.integers(1, 40),
    "n_head": st.integers(1, 12),
    "n_kv_head": st.integers(1, 12),
    "position_encoding": st.sampled_from(["rope", "none"]),
    "attention_backend": st.sampled_from(["sdpa", "flash_attn"]),
    "min_lr": st.sampled_from([1e-5, 1.0]),
    "kernels": st.sampled_from(["auto", "triton"]),
    "use_zero1": st.booleans(),
    "use_fsdp": st.booleans(),
    "compile_scope": st.sampled_from(["block", "model"]),
    "fsdp_reduce_once": st.booleans(),
    "fsdp_gather_once": st.booleans(),
    "recompute": st.sampled_from(["none", "full"]),
    "profile": st.sampled_from(["", "5:3", "1:9999"]),
    "overwrite": st.booleans(),
    "init_from": st.sampled_from(["scratch", "resume", "resum"]),
    "gradient_accumulation_steps": st.sampled_from([1, 7, 8]),
}


def _last_mistake(argv: list[str]) -> str | None:
    try:
        command_line.resolve(argv, world_size=4)
    except ConfigError as error:
        return str(error).splitlines()[-1]
    return None


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({}, optional=VALUES))
def test_the_nearest_values_of_a_configuration_lead_to_one_that_is_right(values: dict[str, object]) -> None:
    values = {"device": "cpu", **values}
    for _ in range(20):
        line = _last_mistake([f"--{key}={value}" for key, value in values.items()])
        if line is None:
            return
        found = NEAREST.search(line)
        assert found, line
        key = found[1] or found[2] or line.replace("command line: ", "").strip().partition(":")[0].split(",")[0]
        values[key] = found[3]
    raise AssertionError(f"the advice does not come to an end: {values}")
