"""What goes wrong first on a GPU, by its errors' texts and on an emulated one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.errors import reason_of
from harness.estimator.checks import fixed_arithmetic
from harness.estimator.device import choose_device
from harness.estimator.memory import is_out_of_memory
from harness.registry import get
from tests.cuda_emulation import emulated_cuda

NO_MEMORY = [
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "CUDA driver error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    "Unable to find a valid cuDNN algorithm to run convolution",
    "GET was unable to find an engine to execute this computation",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error\nLast error:\nCuda failure 2 'out of "
    "memory'",
    "[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: can't allocate memory",
    "could not create a primitive",
]


@pytest.mark.parametrize("text", NO_MEMORY)
def test_memory_that_ran_out_is_known_by_every_library_s_text(text):
    assert is_out_of_memory(RuntimeError(text))
    assert "use fewer --jobs or a smaller batch" in reason_of(RuntimeError(text))


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: device-side assert triggered",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`",
        "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
    ],
)
def test_other_errors_are_not_taken_for_it(text):
    assert not is_out_of_memory(RuntimeError(text))


def test_memory_that_nothing_wrote_to_is_not_filled():
    assert torch.utils.deterministic.fill_uninitialized_memory
    with fixed_arithmetic(nn.Linear(1, 1)):
        assert torch.are_deterministic_algorithms_enabled()
        # What deterministic mode fills is nan.
        assert not torch.empty(1 << 12).isnan().all()
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize(
    ("given", "world", "asked"),
    [
        ("cuda", "4", "cuda:3"),
        ("cuda", "1", "cuda"),
        ("cuda:1", "4", "cuda:1"),
        ("cpu", "4", "cpu"),
    ],
)
def test_a_process_of_torchrun_touches_its_own_gpu_alone(monkeypatch, given, world, asked):
    touched = []
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch, "empty", lambda *_, device: touched.append(device))
    assert choose_device(nn.Module(), given) == torch.device(asked)
    assert touched == [torch.device(asked)]


def test_building_a_model_leaves_the_gpus_generators_alone(monkeypatch):
    with emulated_cuda():
        for name in ("get_rng_state", "set_rng_state", "manual_seed_all"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("a GPU was asked"))
        model = get("gpt-pydoc").build({"vocab_size": 9, "context": 4}, seed=1)
        monkeypatch.undo()
    again = get("gpt-pydoc").build({"vocab_size": 9, "context": 4}, seed=1)
    assert torch.equal(next(model.parameters()), next(again.parameters()))
