"""Fixtures of the tests of models of Hugging Face."""

import sys

import pytest


@pytest.fixture(autouse=True)
def _modules(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the copies of modeling_gptperf.py that transformers makes out of the user's cache."""
    transformers = sys.modules.get("transformers")
    if transformers is not None:
        cache = str(tmp_path_factory.getbasetemp() / "hf_modules")
        monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
