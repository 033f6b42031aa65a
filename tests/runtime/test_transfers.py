"""Transfers between device and host, as far as a CPU-only machine can test them."""

import torch

from funmatch.runtime import transfers

CPU = torch.device("cpu")


def test_snapshot_does_not_follow_later_changes():
    weight, step = torch.ones(3), torch.tensor(1)
    snapshot = transfers.snapshot({"student": {"weight": weight}, "optimizer": {"weight": 2 * weight, "step": step}})
    weight.zero_()
    step += 1
    assert snapshot["student"]["weight"].tolist() == [1, 1, 1]
    assert snapshot["optimizer"]["weight"].tolist() == [2, 2, 2]
    assert snapshot["optimizer"]["step"].item() == 1
    assert [list(each) for each in snapshot.values()] == [["weight"], ["weight", "step"]]


def test_cpu_tensors_are_not_copied():
    tensors = torch.ones(2), torch.zeros(1, dtype=torch.int64)
    fetched = transfers.copy_to_host(*tensors)
    assert fetched.arrived
    assert all(host_tensor is tensor for host_tensor, tensor in zip(fetched.wait(), tensors, strict=True))
    assert transfers.to_device(tensors[0], CPU) is tensors[0]
