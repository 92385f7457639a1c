"""How kernels are launched: what Triton compiled for a kind of arguments is kept, and used for that kind alone."""

from typing import Any

import pytest
import torch

from modeling.ops import launch as module
from modeling.ops.launch import launch


class Kernel:
    """A Triton kernel as `launch` sees it: compiles at every call made through it, and says with what."""

    def __init__(self) -> None:
        self.compilations: list[dict[str, Any]] = []
        self.launches: list[tuple] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            self.compilations.append(options)
            self.launches.append((grid, arguments))
            return Compiled(self)

        return run


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.kernel.launches.append((grid, arguments))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(module, "_compiled", {})
    return Kernel()


def aligned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    assert tensor.data_ptr() % 16 == 0
    return tensor


def test_compiles_once_for_a_kind(kernel: Kernel) -> None:
    for numbers in ((32, 1e-6), (48, 1e-5), (64, 0.0)):
        x, y = aligned(8), aligned(8)
        launch(kernel, (3,), (x, y), numbers, (True, 128), num_warps=8)
        assert kernel.launches[-1][1] == (x, y, *numbers, True, 128)
    assert kernel.compilations == [{"num_warps": 8}]
    assert [grid for grid, _ in kernel.launches] == [(3,), (3, 1, 1), (3, 1, 1)]


@pytest.mark.parametrize(
    "change",
    [
        {"numbers": (1,)},
        {"numbers": (33,)},
        {"numbers": (2**31,)},
        {"constants": (256,)},
        {"num_warps": 4},
        {"tensors": (torch.empty(8, dtype=torch.bfloat16),)},
    ],
    ids=["one", "odd", "64 bits", "constant", "warps", "dtype"],
)
def test_compiles_again_for_another(kernel: Kernel, change: dict[str, Any]) -> None:
    given: dict[str, Any] = {"tensors": (aligned(8),), "numbers": (32,), "constants": (128,), "num_warps": 8}
    for arguments in (given, given | change, given, given | change):
        launch(kernel, (1,), **arguments)
    assert len(kernel.compilations) == 2


def test_other_addresses_go_through_triton(kernel: Kernel) -> None:
    for offset in (0, 1, 0, 1):
        launch(kernel, (1,), (aligned(9)[offset:],), (32,), ())
    assert len(kernel.compilations) == 3  # the first at 0, and both at 1


def test_an_interpreter_compiles_nothing(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kernel, "__getitem__", lambda self, grid: lambda *arguments, **options: None)
    for _ in range(2):
        launch(kernel, (1,), (aligned(8),), (32,), ())
    assert not module._compiled
