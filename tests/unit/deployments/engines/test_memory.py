"""The memory of a computation is measured without allocating it."""

import torch

from deployments.engines.memory import _Tracker, free_bytes, working_bytes

KB = 1024


def zeros(kilobytes: int) -> torch.Tensor:
    return torch.zeros(kilobytes * KB // 4)


def test_the_peak_excludes_freed_memory() -> None:
    def computation() -> None:
        a = zeros(4)
        b = a + 1  # 8 KB
        del a
        c = b * 2  # 8 KB
        d = torch.cat([b, c])  # 16 KB
        del b, c, d
        zeros(12)

    assert working_bytes(computation) == 16 * KB


def test_weights_are_not_counted_and_stay_as_they_are() -> None:
    linear = torch.nn.Linear(1024, 1024)
    before = linear.weight.clone()
    assert working_bytes(lambda: linear(torch.empty(1, 1024))) == 8 * KB  # input and output
    assert torch.equal(linear.weight, before)
    assert type(linear.weight) is torch.nn.Parameter


def test_the_estimate_equals_the_real_computation() -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(8, 3, 3, padding=1)
    )

    def computation() -> torch.Tensor:
        result: torch.Tensor = net(torch.zeros(1, 3, 64, 64))
        return result

    with torch.inference_mode(), _Tracker() as tracker:
        computation()
    assert working_bytes(computation) == tracker.peak > 0


def test_a_computation_larger_than_the_memory_can_be_measured() -> None:
    assert working_bytes(lambda: torch.empty(10**15)) == 4 * 10**15 > free_bytes(torch.device("cpu"))
