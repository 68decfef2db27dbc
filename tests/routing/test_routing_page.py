"""docs/operate/routing.md does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from lightning_ep import callbacks
from tests.reference import batches, tiny_model

PAGE = (Path(__file__).parents[2] / "docs" / "operate" / "routing.md").read_text()


def test_the_blocks_of_the_page_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    loop, picture = re.findall(r"```python\n(.*?)```", PAGE, re.S)[:2]
    exec(loop, {"model": tiny_model(), "batches": batches(2, 2)})
    printed = capsys.readouterr().out
    assert "tensor(1.," in printed, "one process waits for nobody"
    assert "torch.Size([2, 8])" in printed
    names: dict[str, object] = {"torch": torch}
    exec(picture, names)
    title = names["axes"].get_title(loc="left")  # type: ignore[attr-defined]
    assert re.search(r"layer 8 expert 23 \(\d+\.\d\)", title)
    assert "layer 4: 58 of 64 experts" in title
    assert (tmp_path / "routing.png").stat().st_size > 10_000
    recipe = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)[0]
    for entry in yaml.safe_load(recipe)["trainer"]["callbacks"]:
        getattr(callbacks, entry["class_path"].removeprefix("lightning_ep.callbacks."))()


def test_every_name_that_is_logged_is_on_the_page() -> None:
    from lightning_ep.routing import Routed, RoutingSummary

    metric = RoutingSummary({"a": 4})
    metric.update([Routed(torch.tensor([[0, 1]]))])
    for name in metric.measures(metric.totals_MC).means():
        assert f"| `{name}` |" in PAGE, name
