"""What is handed from a device to the CPU, as far as a machine without an accelerator shows it."""

import torch

from funmatch.runtime import transfers

CPU = torch.device("cpu")


def test_a_snapshot_is_what_was_then():
    weight, step = torch.ones(3), torch.tensor(1)
    kept = transfers.snapshot({"student": {"weight": weight}, "optimizer": {"weight": 2 * weight, "step": step}})
    weight.zero_()
    step += 1
    assert kept["student"]["weight"].tolist() == [1, 1, 1]
    assert kept["optimizer"]["weight"].tolist() == [2, 2, 2]
    assert kept["optimizer"]["step"].item() == 1
    assert [list(each) for each in kept.values()] == [["weight"], ["weight", "step"]]


def test_what_is_on_the_cpu_has_arrived():
    tensors = torch.ones(2), torch.zeros(1, dtype=torch.int64)
    fetched = transfers.copy_to_host(*tensors)
    assert fetched.arrived
    assert all(there is tensor for there, tensor in zip(fetched.wait(), tensors, strict=True))
    assert transfers.to_device(tensors[0], CPU) is tensors[0]
