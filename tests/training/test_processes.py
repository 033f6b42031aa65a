"""Several processes teach the student that one would, and begin, stop and fail as one."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from funmatch.runtime import env
from funmatch.training.run import folder as run_folder

WORDS = [
    "--data", "fashion-mini", "--batch", "16", "--steps", "12", "--save-every", "4", "--eval-every", "6",
    "--log-every", "1", "--lr", "0.001", "--device", "cpu",
]  # fmt: skip
TAUGHT = ["distill", "--teacher", "fashion-mini-teacher", "--teacher-precision", "fp32", *WORDS]
RESNET = ["--student", "resnet10t", "--student-kwargs", "channels=8,16,16,24", "stem_width=8"]
PLAIN, BATCHNORM = [*RESNET, "norm_layer=groupnorm1"], ["--student", "fashion-mini-student"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(*words: str | Path, world: int = 1) -> list[subprocess.Popen]:
    """`world` processes of `python words…`, told what torchrun tells its processes."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    seats = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)} for rank in range(world)]
    return [
        subprocess.Popen(
            [sys.executable, "-W", "error", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env={**os.environ, **(shared | seat if world > 1 else {})},
        )
        for seat in seats
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen], code: int = 0) -> list[str]:
    """What each process said, after all have ended alike."""
    try:
        said = ["".join(process.communicate(timeout=120)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code] * len(processes), said
    return said


def run(out: Path, *words: str | Path, world: int = 1) -> Path:
    ended(start("-m", "funmatch", *words, "--out", out, world=world))
    return out


def student(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "student" / "model.safetensors")


def records(out: Path, event: str) -> list[dict]:
    return [record for record in run_folder.Run(out).metrics.read() if record["event"] == event]


def assert_near(one: Path, two: Path, share: float = 1e-5) -> None:
    """The students, and what was recorded on the way, are the same up to rounding."""
    first, second = student(one), student(two)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        error = (second[name].double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1e-3)
        assert error < share, f"{name}: {error:.1e}"
    losses = [[(record["step"], record["loss"]) for record in records(out, "step")] for out in (one, two)]
    assert [step for step, _ in losses[0]] == [step for step, _ in losses[1]] != []
    for (_, loss), (_, other) in zip(*losses, strict=True):
        assert other == pytest.approx(loss, rel=1e-5)
    for event in ("step", "eval", "ema", "teacher"):
        steps = [[record["step"] for record in records(out, event)] for out in (one, two)]
        assert steps[0] == steps[1], "each is recorded once"


@pytest.mark.slow
@pytest.mark.parametrize(("words", "share"), [(PLAIN, 1e-5), (RESNET, 2e-4)], ids=["GroupNorm", "BatchNorm"])
def test_two_processes_teach_the_student_of_one(tmp_path, words, share):
    """With BatchNorm, one process on two threads is as far from itself on one: 4e-5 where a bias is near zero."""
    one = run(tmp_path / "one", *TAUGHT, *words, "--side", "28")
    two = run(tmp_path / "two", *TAUGHT, *words, "--side", "28", world=2)
    assert_near(one, two, share)
    assert any(name.endswith("running_var") for name in student(two)) == (words is RESNET)
    timm.create_model(f"local-dir:{two}/student", pretrained=True)
    assert (two / "report.html").is_file()


@pytest.mark.slow
def test_two_processes_share_the_roots_of_shampoo(tmp_path):
    words = [*TAUGHT, *PLAIN, "--side", "28", "--optimizer", "shampoo", "--lr", "0.1", "--optimizer-kwargs"]
    words += ["block_size=16", "start_preconditioning_step=2"]
    one, two = (run(tmp_path / str(world), *words, world=world) for world in (1, 2))
    assert_near(one, two, 1e-3)


@pytest.mark.slow
def test_two_processes_record_one_tape(tmp_path):
    """Each records its share; whoever replays it learns what they learnt, alone or together."""
    words = [*TAUGHT, *PLAIN, "--side", "28", "--tape", tmp_path / "tape"]
    live = run(tmp_path / "live", *words, world=2)
    for world in (1, 2):
        replayed = run(tmp_path / str(world), *words, world=world)
        assert_near(live, replayed)
        if world == 2:
            assert all(torch.equal(tensor, student(replayed)[name]) for name, tensor in student(live).items())
    said = ended(start("-m", "funmatch", "tape", tmp_path / "tape"))
    assert "192 sound, 0 damaged" in said[0], "12 steps of 16 images"


@pytest.mark.slow
def test_torchrun_itself(tmp_path):
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command = ["--master-port", str(free_port()), "-m", "funmatch", *TAUGHT, *BATCHNORM, "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, *words, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("top-1") == 2, "one table, of the student and its teacher"
    assert len(records(tmp_path / "run", "step")) == 12


def test_a_batch_that_cannot_be_shared_is_told_once(tmp_path):
    words = ["train", *WORDS, *BATCHNORM, "--batch", "15", "--out", tmp_path / "run"]
    said = ended(start("-m", "funmatch", *words, world=2), 2)
    assert "".join(said).count("must be a multiple of 2") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all(tmp_path):
    words = ["train", *WORDS, *BATCHNORM, "--lr", "1e30", "--warmup-steps", "0", "--out", tmp_path / "run"]
    said = ended(start("-m", "funmatch", *words, world=2), 2)
    assert "".join(said).count("no longer finite") == 1
    assert "Traceback" not in "".join(said)


@pytest.mark.slow
def test_a_run_that_another_process_holds_is_told_once(tmp_path):
    out = tmp_path / "run"
    words = ["train", *WORDS, *BATCHNORM, "--out", out]
    with run_folder.open_run(out, "train", {}, {}):
        (out / "config.json").write_text("{")
        said = ended(start("-m", "funmatch", *words, world=2), 2)
    assert "".join(said).count("funmatch: ") == 1


def test_other_verbs_are_for_one_process():
    said = ended(start("-m", "funmatch", "models", world=2), 2)
    expected = "models runs in a single process; only train, finetune, distill support torchrun"
    assert "".join(said) == f"funmatch: {expected}\n"


def test_alone_nobody_is_asked(monkeypatch):
    monkeypatch.setenv("RANK", "3")  # left by something else: torchrun says more
    assert (env.rank(), env.world_size(), env.local_world_size(), env.is_main_process()) == (0, 1, 1, True)


TOGETHER = """
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from funmatch.models.sync_batchnorm import GlobalBatchNorm, sync_batchnorm
from funmatch.runtime import distributed, env

def learn(net, views, weights):
    net.zero_grad()
    (net(views) * weights).sum(1).mean().backward()
    return [each.grad for each in net.parameters()]

def made():
    torch.manual_seed(0)
    norms = BatchNormAct2d(8, act_layer=nn.SiLU, momentum=None), nn.BatchNorm2d(4), nn.BatchNorm1d(64)
    return nn.Sequential(nn.Conv2d(3, 8, 3), norms[0], nn.Conv2d(8, 4, 3), norms[1], nn.Flatten(), norms[2])

with distributed.process_group("cpu"):
    plain, ours = made(), sync_batchnorm(made(), torch.device("cpu"))
    assert isinstance(ours[3], GlobalBatchNorm)
    assert plain.state_dict().keys() == ours.state_dict().keys()
    rows = slice(env.rank() * 3, env.rank() * 3 + 3)
    for turn in range(3):
        views, weights = 5 + torch.rand(6, 3, 8, 8), torch.randn(6, 64)
        whole, shares = learn(plain, views, weights), learn(ours, views[rows], weights[rows])
        distributed.all_reduce_mean_(shares)
        torch.testing.assert_close(shares, whole, rtol=1e-4, atol=1e-4)
    for name, kept in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], kept, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.eval()(views), plain.eval()(views))
    assert distributed.all_reduce_max(env.rank()) == 1
    assert distributed.broadcast_from_main(env.rank) == 0
    own = [torch.full((2, 2), env.rank()), torch.full((3,), float(env.rank()))]
    distributed.broadcast_(own)
    assert not any(each.any() for each in own)
    for count in (5, 2, 1):  # one process has less to do than the other, or nothing
        stacks, begun = torch.arange(count * 4.0).view(count, 2, 2), []
        count_and_add = lambda *parts: begun.append(len(parts[0])) or parts[0] + parts[1]
        made = distributed.sharded_map(count_and_add, stacks, 10 * stacks)
        assert torch.equal(made, 11 * stacks)
        assert begun == [-(-count // 2) if env.is_main_process() else count // 2]
with distributed.process_group("cpu"):  # again, in the same processes
    distributed.barrier()
print("good")
"""


def test_statistics_and_gradients_are_those_of_the_global_batch():
    said = ended(start("-c", TOGETHER, world=2))
    assert [each.splitlines()[0] for each in said] == ["good"] * 2, "an older torch may add a remark of its own"


DOUBLE = """
import sys
import timm, torch
from torch import nn
import funmatch
from funmatch.runtime.env import reported_elsewhere

class Double(nn.Module):
    def __init__(self):
        super().__init__()
        kwargs = {"channels": (8, 16, 16, 24), "stem_width": 8, "num_classes": 10}
        self.net, self.num_classes = timm.create_model("resnet10t", **kwargs).double(), 10

    def forward(self, views):
        return self.net(views.double())

out, steps = sys.argv[1], int(sys.argv[2])
torch.manual_seed(3)
knobs = {"batch": 16, "log_every": 3, "eval_every": 60, "save_every": 20, "ema": 0.9, "side": 28, "threads": 1}
try:
    funmatch.train("fashion-mini", Double(), out, steps=steps, device="cpu", **knobs)
except KeyboardInterrupt as stopped:
    print("" if reported_elsewhere(stopped) else stopped)
    sys.exit(128 + stopped.number)
"""


@pytest.mark.slow
def test_in_double_precision_two_processes_are_one_to_nine_digits(tmp_path):
    """Adam makes much of rounding where a gradient is near zero; here there is hardly any rounding."""
    for world in (1, 2):
        ended(start("-c", DOUBLE, tmp_path / str(world), "12", world=world))
    assert_near(tmp_path / "1", tmp_path / "2", 1e-9)
    averages = [load_file(tmp_path / name / "student-ema" / "model.safetensors") for name in ("1", "2")]
    torch.testing.assert_close(averages[1], averages[0], rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """Two, then one, then two, stopped each time by a signal to only one of the processes."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ended(start("-c", DOUBLE, whole, "240"))

    def reached() -> int:
        return max((int(path.name[5:]) for path in (parts / "checkpoints").glob("step-*")), default=0)

    for world in (2, 1):
        before = reached()
        processes = start("-c", DOUBLE, parts, "240", world=world)
        while reached() <= before and processes[0].poll() is None:
            time.sleep(0.01)
        processes[-1].send_signal(signal.SIGTERM)
        said = "".join(ended(processes, 128 + signal.SIGTERM))
        assert said.count(f"saved step {reached()} of 240") == 1
        assert "Traceback" not in said
        assert before < reached() < 240
    ended(start("-c", DOUBLE, parts, "240", world=2))
    assert_near(whole, parts, 1e-6)


FAILING = """
import time
from funmatch.errors import InputError
from funmatch.runtime import distributed, env
from funmatch.runtime.env import reported_elsewhere
began = time.monotonic()
try:
    with distributed.process_group("cpu"):
        if env.rank() == 1:
            raise InputError("no room here")
        distributed.barrier()
except InputError as error:
    print(env.rank(), reported_elsewhere(error), error, time.monotonic() - began < 10)
"""


def test_whoever_waits_for_a_process_that_failed_is_told():
    said = ended(start("-c", FAILING, world=2))
    assert said == ["0 True another process of this run has ended True\n", "1 False no room here True\n"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--strategy", "ind/ic", "--mixup", "1", "--mixup-mode", "image"],
        ["--strategy", "fix/ic_ens", "--teacher-crops", "10"],
        ["--strategy", "same/ic", "--cutmix", "1", "--mixup", "1", "--randaugment", "2", "9", "--distance", "js"],
    ],
)
def test_every_strategy_is_the_same_for_two_processes(tmp_path, words):
    # Adam divides small gradients by their own size, and so makes much of their rounding; more steps do, too. What is
    # left is that of biases, whose gradients are sums of numbers that nearly cancel.
    plain = [*TAUGHT, *PLAIN, "--optimizer", "sgd", "--steps", "4", "--eval-every", "2", *words]
    one, two = (run(tmp_path / str(world), *plain, world=world) for world in (1, 2))
    assert_near(one, two, 2e-4)
    for mine, other in zip(records(one, "views"), records(two, "views"), strict=True):
        assert mine["kl"] == pytest.approx(other["kl"], rel=1e-4), "the same views, with however many processes"


@pytest.mark.slow
def test_two_processes_prolong_a_run(tmp_path):
    words = [*TAUGHT, *PLAIN, "--schedule", "wsd", "--warmup-steps", "2", "--cooldown-steps", "4"]
    long = run(tmp_path / "long", *words, "--steps", "18", world=2)
    run(tmp_path / "run", *words, world=2)
    again = run(tmp_path / "run", *words, "--steps", "18", world=2)
    assert_near(long, again, 1e-12)
    assert (again / "ends" / "step-000000012" / "result.json").is_file()
