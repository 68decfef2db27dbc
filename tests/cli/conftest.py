"""Where commands run that choose their device by themselves."""

import pytest

from tests.rank_process import on_cuda


@pytest.fixture
def on_the_tests_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides GPUs from commands that take those that there are, where tests are for the CPU."""
    if not on_cuda():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
