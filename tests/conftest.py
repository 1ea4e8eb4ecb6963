"""What all tests share: the data sets, and the device."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.base_install import BaseInstall, make

if TYPE_CHECKING:
    from harness.leaderboard.tables import Dataset


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        help="where the estimator's, training's and campaign's tests compute: cpu, cuda, or "
        "emulated for CUDA's rules on the CPU",
    )


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what is noted of checked tables out of the user's cache; all workers share it.

    And print as wide as lines are, whatever width the shell around has.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(shared / "cache"))
        patch.delenv("COLUMNS", raising=False)
        yield


@pytest.fixture(scope="session")
def data_root() -> Path:
    root = Path(
        os.environ.get("HARNESS_DATA_ROOT")
        or Path(__file__).resolve().parents[1].parent / "shared/data"
    )
    if not root.is_dir():
        pytest.skip(f"the data packs are not at {root}; set HARNESS_DATA_ROOT")
    return root


@pytest.fixture(scope="session")
def bundled() -> Dataset:
    """What the leaderboard is made from in the bundled release; reading it takes seconds."""
    from harness.leaderboard import tables

    return tables.read(None)


@pytest.fixture(scope="session")
def base_install(tmp_path_factory: pytest.TempPathFactory) -> BaseInstall:
    """An environment with the base install alone."""
    return make(tmp_path_factory.mktemp("base") / "env")


@pytest.fixture(autouse=True)
def _elsewhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let tests that name no device compute on the one that is asked for."""
    name = request.config.getoption("--device")
    if name == "cpu":
        yield
    elif name == "emulated":
        from tests.cuda_emulation import emulated_cuda

        with emulated_cuda():
            _compute_on("cuda", monkeypatch)
            yield
    else:
        _compute_on(name, monkeypatch)
        yield


def _compute_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a device for the CPU: in products, in training, and where results are compared.

    A product of vectors that a test has on the CPU comes back there.
    """
    import torch
    from torch.utils._pytree import tree_map_only

    from harness.estimator.hessian import BlockHessian
    from harness.training.loop import train

    init, products = BlockHessian.__init__, BlockHessian.products
    dense, compare = BlockHessian.dense, torch.testing.assert_close

    def init_there(
        self: BlockHessian, objective: Any, blocks: Any, settings: Any, **options: Any
    ) -> None:
        if settings.device in (None, "cpu"):
            settings = replace(settings, device=name)
        init(self, objective, blocks, settings, **options)

    def products_there(
        self: BlockHessian, requests: Sequence[tuple[int, torch.Tensor]]
    ) -> list[torch.Tensor]:
        found = products(self, [(index, v.to(self.device)) for index, v in requests])
        return [found.to(v.device) for found, (_, v) in zip(found, requests, strict=True)]

    def compare_here(actual: Any, expected: Any, **options: Any) -> None:
        compare(*tree_map_only(torch.Tensor, torch.Tensor.cpu, (actual, expected)), **options)

    monkeypatch.setattr(BlockHessian, "__init__", init_there)
    monkeypatch.setattr(BlockHessian, "products", products_there)
    monkeypatch.setattr(BlockHessian, "dense", lambda self, index: dense(self, index).cpu())
    monkeypatch.setattr(torch.testing, "assert_close", compare_here)
    monkeypatch.setitem(train.__kwdefaults__, "device", name)
    monkeypatch.setenv("HARNESS_TEST_DEVICE", name)
