"""Which GPU a process takes, and what is said when processes lose each other."""

from __future__ import annotations

import os

import pytest
import torch.distributed as dist
from click.testing import CliRunner

from harness.campaign.engines import local as workers
from harness.campaign.engines.ray import task_device
from harness.campaign.unit import Unit
from harness.cli import main
from harness.errors import UserError
from harness.estimator import distributed


def gpu_of(unit: Unit, on_progress: object) -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "taken"), [(["5", "GPU-7"], {"5", "GPU-7"}), (["5"], {"5"})])
def test_workers_take_the_gpus_that_their_parent_counted(monkeypatch, gpus, taken):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(gpus))
    engine = workers.Workers(gpu_of, 2, spread=True)
    futures = [engine.submit(Unit("m", "train", seed=seed)) for seed in range(4)]
    seen = {future.result() for future in futures}
    engine.close()
    assert seen
    assert seen <= taken


def test_gpus_are_those_that_are_visible(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert workers.visible_gpus() == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-4")
    assert workers.visible_gpus() == ["2", "GPU-4"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert workers.visible_gpus() == []


def test_a_worker_asks_no_gpu_before_it_has_chosen_its_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: pytest.fail("CUDA was started"))
    monkeypatch.setattr(workers.multiprocessing, "parent_process", lambda: _Endless())
    monkeypatch.setattr(workers.signal, "signal", lambda *_: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    counter = workers.multiprocessing.get_context("spawn").Value("i", 1)
    workers._start_worker(counter, [], ["6", "7"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"


class _Endless:
    def join(self) -> None:
        import threading

        threading.Event().wait()


@pytest.fixture
def joined(monkeypatch):
    """Let a process believe that it is one of two."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "rendezvous", lambda _: iter([(dist.HashStore(), 0, 2)]))
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda *_, **__: None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("NCCL error: ncclInvalidUsage: Duplicate GPU detected : rank 0 and rank 1", "Duplicate"),
        ("NCCL error: unhandled cuda error: Cuda failure 'out of memory'", "a smaller batch"),
        ("NCCL error: ncclSystemError: no socket interface found", "no socket interface"),
    ],
)
def test_an_error_of_nccl_is_said_and_is_not_a_lost_process(joined, text, said):
    with (
        pytest.raises(RuntimeError, match="can't work together") as caught,
        distributed.team("cpu"),
    ):
        raise dist.DistBackendError(text)
    assert said in str(caught.value)
    assert "lost" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError("NCCL error: ncclRemoteError: a call failed since a peer exited"),
        dist.DistNetworkError("failed to recv, got 0 bytes"),
        RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
    ],
)
def test_a_process_that_is_lost_is_said_with_the_cause(joined, error):
    with pytest.raises(RuntimeError, match="process of the job was lost") as caught:  # noqa: SIM117
        with distributed.team("cpu"):
            raise error
    assert str(error).split(":")[0] in str(caught.value)


def test_ray_shows_each_task_its_own_gpu_so_that_none_is_named():
    assert [task_device(name) for name in (None, "cpu", "cuda")] == [None, "cpu", "cuda"]
    with pytest.raises(UserError, match=r"--device cuda:1 names one GPU.*pass --device cuda"):
        task_device("cuda:1")


def test_a_head_node_without_a_gpu_starts_a_run_on_a_cluster_of_gpus(monkeypatch, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'hessian-spectra[ray]'")

    def surveyed(*_: object) -> None:
        raise UserError("the survey was reached")

    monkeypatch.setattr("harness.campaign.survey.survey", surveyed)
    command = ["run", "cnn-digits", "--engine", "ray", "--out", str(tmp_path / "out"), "--device"]
    beside = CliRunner().invoke(main, [*command, "cuda", "--address", "10.0.0.1:6379"])
    assert "the survey was reached" in str(beside.output) + str(beside.exception)
    alone = CliRunner().invoke(main, [*command, "cuda"])  # tasks would wait for ever
    assert "device 'cuda' cannot be used" in str(alone.output) + str(alone.exception)
