# SPDX-License-Identifier: Apache-2.0
"""Trainers as they are: ranks, forks, optimised Python, disks that fill up."""

from __future__ import annotations

import math
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import noether_writer
import pytest
import torch
from conftest import RunningDaemon
from harness import until
from noether_writer import errors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

RANKS = """
import os, sys, torch, torch.distributed as dist
from types import SimpleNamespace as N
import noether_writer
dist.init_process_group("gloo", init_method="file://" + sys.argv[1] + "/store", rank=int(sys.argv[2]), world_size=2)
provider = N(output_root=sys.argv[1], run_id="r", stage_name=None, debug=False)
counter = N(epoch=1, update=2, sample=3, cur_iteration={"epoch": 1, "update": 2, "sample": 3})
writer = noether_writer.CheckpointWriter(provider, counter)
log = noether_writer.LogWriter(provider, counter, N(log=lambda data: None))

class Model(torch.nn.Linear):
    name, is_frozen, optimizer = "net", False, None

class Trainer:
    def state_dict(self):
        # As a trainer that gathers its random states: it hangs unless every rank calls it.
        parts = [None, None]
        dist.all_gather_object(parts, dist.get_rank())
        return {"parts": parts}

writer.save(Model(2, 2), "E1", Trainer())
log.add_scalar("loss", float(dist.get_rank()))
log.flush()
assert len(log.log_entries) == 1 and log.get_all_metric_values("loss") == [float(dist.get_rank())]
log.finish()
writer.wait(30)
wrapped = torch.nn.parallel.DistributedDataParallel(Model(2, 2))
if dist.get_rank() == 0:
    try:
        writer.save(wrapped, "E2")
    except RuntimeError as error:
        print("refused:", error)
run = noether_writer.open_run(sys.argv[1], "general")
run.save("part", "rank%d" % run.rank, {"rank": run.rank}).wait(30)
# On every rank, as people write it: rank 0's is the log.
for update in (1, 2):
    run.log({"loss": 1.0 + run.rank}, update=update)
dist.barrier()
run.finish()
run.close()
dist.destroy_process_group()
"""


def test_every_rank_takes_part_and_rank_0_writes(daemon: RunningDaemon, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANKS, str(tmp_path)]
    ranks = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert "refused:" in outputs[0][0]
    assert [error.count("nothing is logged here") for _, error in outputs] == [0, 1]
    assert torch.load(tmp_path / "r/checkpoints/net_cp=E1_trainer.th") == {"parts": [0, 1]}
    assert torch.load(tmp_path / "r/tracker/entries.th")["loss"] == {2: 0.0}
    assert {p.name for p in (tmp_path / "general/checkpoints").iterdir()} == {
        "part_cp=rank0_model.th",
        "part_cp=rank1_model.th",
    }
    assert torch.load(tmp_path / "general/tracker/entries.th")["loss"] == {1: 1.0, 2: 1.0}


PARTS = """
import sys, torch, torch.distributed as dist
from types import SimpleNamespace as N
import noether_writer
from torch.distributed.tensor import DTensor, Partial, Replicate, init_device_mesh
rank, size = int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method="file://" + sys.argv[1] + "/store", rank=rank, world_size=size)
mesh = init_device_mesh("cpu", (size,))
norm = DTensor.from_local(torch.tensor(1.0 + rank), mesh, [Partial()])
run = noether_writer.open_run(sys.argv[1], "r")
# Its type is known as one of numbers, or not yet.
for update in (1, 3):
    try:
        run.log({"loss": 1.0, "norm": norm}, update=update)
    except noether_writer.NoetherWriterError as error:
        print("refused:", error)
    run.log({"whole": DTensor.from_local(torch.tensor(7.0), mesh, [Replicate()])}, update=update + 1)
run.log({"norm": norm.full_tensor()}, update=5)
counter = N(epoch=0, update=1, sample=1)
log = noether_writer.LogWriter(N(output_root=sys.argv[1], run_id="l", stage_name=None), counter, N(log=print))
try:
    log.add_scalar("norm", norm)
except noether_writer.NoetherWriterError as error:
    print("refused:", error)
run.finish()
run.close()
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("size", [1, 2])
def test_one_shard_of_a_number_is_never_logged_as_the_number(size: int, daemon: RunningDaemon, tmp_path: Path) -> None:
    """A gradient's norm, say, under FSDP: `item()` of a partial DTensor gives what this rank has of it."""
    command = [sys.executable, "-c", PARTS, str(tmp_path)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(size)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * size, outputs
    found = torch.load(tmp_path / "r/tracker/entries.th")
    if size == 1:
        assert "refused:" not in outputs[0][0]
        assert found == {"loss": {1: 1.0, 3: 1.0}, "norm": {1: 1.0, 3: 1.0, 5: 1.0}, "whole": {2: 7.0, 4: 7.0}}
        return
    assert found == {"whole": {2: 7.0, 4: 7.0}, "norm": {5: 3.0}}
    said = "'norm' of update 1: a DTensor whose placements are (Partial(sum),) is this rank's part of a number"
    assert said in outputs[0][0] and outputs[0][0].count("refused:") == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_compiled_logs_and_saves_the_values_of_its_run(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    model = torch.nn.Sequential(*(torch.nn.Linear(300, 300) for _ in range(3)))
    optimizer = torch.optim.Adam(model.parameters())
    counter = SimpleNamespace(epoch=0, update=0, sample=0)
    provider = SimpleNamespace(output_root=tmp_path, run_id="l", stage_name=None)
    log = noether_writer.LogWriter(provider, counter, SimpleNamespace(log=lambda values: None))
    expected: list[float] = []
    tickets: list[noether_writer.Ticket] = []
    states: list[dict[str, torch.Tensor]] = []

    def step(inputs: torch.Tensor, update: int) -> torch.Tensor:
        loss: torch.Tensor = model(inputs).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        run.log({"loss": loss, "half": {"loss": loss / 2}, "update": update}, update=update)
        log.add_scalar("loss", loss)
        log.flush()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loss": loss.detach()}
        tickets.append(run.save("net", f"U{update}", state, snapshot="overlap" if update % 2 else "copy"))
        expected.append(loss.item())
        return loss * 2

    compiled = torch.compile(step, backend="eager")
    for update in range(1, 6):
        counter.update = update
        compiled(torch.full((2, 300), float(update)), update)
        # The step of the next update waits for the copy.
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    run.finish(30)
    for ticket, state, loss in zip(tickets, states, expected, strict=True):
        saved = torch.load(ticket.paths[0])
        assert saved["loss"].item() == loss
        assert all(torch.equal(saved["model"][name], value) for name, value in state.items())
    log.finish()
    entries = torch.load(tmp_path / "r/tracker/entries.th")
    assert list(entries["loss"].values()) == expected
    assert list(entries["half/loss"].values()) == [value / 2 for value in expected]
    assert entries["update"] == {update: update for update in range(1, 6)}
    assert list(torch.load(tmp_path / "l/tracker/entries.th")["loss"].values()) == expected
    run.close()


# Of each type, numbers that a conversion could get wrong.
NUMBERS: dict[torch.dtype, list[Any]] = {
    torch.float64: [0.1, -0.0, 5e-324, 1.7e308, math.inf, -math.inf, math.nan],
    torch.float32: [0.1, -0.0, 1e-45, 3.4e38, math.inf, -math.inf, math.nan],
    torch.float16: [0.1, -0.0, 6e-8, 65504.0, math.inf, math.nan],
    torch.bfloat16: [0.1, -0.0, 1e-40, 3.3e38, math.inf, math.nan],
    torch.float8_e4m3fn: [0.1, 448.0],
    torch.float8_e5m2: [0.1, 57344.0, math.inf],
    torch.bool: [False, True],
    torch.uint8: [0, 255],
    torch.int8: [-128, 127],
    torch.int16: [-(1 << 15), (1 << 15) - 1],
    torch.int32: [-(1 << 31), (1 << 31) - 1],
    torch.int64: [-(1 << 63), (1 << 63) - 1, 1 << 53 | 1],
    torch.uint16: [(1 << 16) - 1],
    torch.uint32: [(1 << 32) - 1],
    torch.uint64: [(1 << 64) - 1, 1 << 63, (1 << 63) - 1],
}


class Doubles(TorchDispatchMode):
    """A mode that says what a number is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return 2 * found if func is torch.ops.aten._local_scalar_dense.default else found


def odd_tensors() -> dict[str, torch.Tensor]:
    """Tensors of one element whose number is not simply what lies where their memory begins."""
    base, pair = torch.arange(1.0, 13.0).reshape(3, 4), torch.tensor([1 + 2j, 3 + 4j])
    with torch.inference_mode():
        made_in_inference = torch.tensor(6.0)
    return {
        "view": base[1, 2],
        "column": base[1:2, 2:3],
        "transposed": base.t()[2:3, 1],
        "expanded": base[2, 3].expand(1, 1, 1),
        "of_zero_stride": base[0].as_strided((1,), (0,), 3),
        "real": pair[1].real,
        "imaginary": pair[1].imag,
        "negated": pair.conj().imag[1],
        "negated_view": torch._neg_view(base[1, 2]),
        "negated_twice": torch._neg_view(torch._neg_view(base[1, 2])),
        "negated_int": torch._neg_view(torch.tensor(5)),
        "of_zeros": torch._efficientzerotensor((1,)),
        "lazy_clone": torch._lazy_clone(base[1, 2]),
        "requires_grad": torch.tensor(3.0, requires_grad=True),
        "with_history": (torch.tensor(3.0, requires_grad=True) * 2).sum(),
        "in_inference": made_in_inference,
        "parameter": torch.nn.Parameter(torch.tensor(8.0)),
        "buffer": torch.nn.Buffer(torch.tensor(9)),
        "quantized": torch.quantize_per_tensor(torch.tensor(0.5), 0.1, 3, torch.quint8),
        "sparse": torch.tensor([4.0]).to_sparse(),
        "shared": torch.tensor(11.0).share_memory_(),
    }


def exact(value: Any) -> tuple[type, Any]:
    """What tells one number from another, -0.0 and the bits of a NaN too."""
    return type(value), struct.pack("<d", value) if isinstance(value, float) else value


def test_a_tensor_is_logged_as_its_item_gives_it(daemon: RunningDaemon, tmp_path: Path) -> None:
    tensors = {
        f"{dtype}/{i}/{len(shape)}": torch.tensor(number, dtype=torch.float64 if dtype.is_floating_point else dtype)
        .to(dtype)
        .reshape(shape)
        for dtype, numbers in NUMBERS.items()
        for i, number in enumerate(numbers)
        for shape in ((), (1, 1))
    } | odd_tensors()
    expected = {key: exact(tensor.item()) for key, tensor in tensors.items()}
    plain = {"float": 0.5, "int": 1, "bool": True, "text": "t", "none": None}
    run = noether_writer.open_run(tmp_path, "r")
    # Nobody knows tensors yet; all at once; one by one; among others, each with an epoch.
    run.log(tensors, update=1)
    run.log(tensors, update=2)
    for update, (key, tensor) in enumerate(tensors.items(), 10):
        run.log({key: tensor}, update=update)
    for update, (key, tensor) in enumerate(tensors.items(), 1000):
        run.log({"before": 1, key: tensor, **plain}, update=update, epoch=update, sample=torch.tensor(update))
    run.finish(30)
    entries = torch.load(tmp_path / "r/tracker/entries.th")
    for count, (key, value) in enumerate(expected.items()):
        found = entries.pop(key)
        assert {update: exact(number) for update, number in found.items()} == dict.fromkeys(
            (1, 2, 10 + count, 1000 + count), value
        ), key
    updates = range(1000, 1000 + len(tensors))
    numbers = {update: update for update in updates}
    assert entries.pop("epoch") == entries.pop("sample") == numbers
    assert entries == {key: dict.fromkeys(updates, value) for key, value in ({"before": 1} | plain).items()}
    run.close()


def test_torch_modes_decide_what_counts_as_a_number(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    tensor = torch.tensor(3.0)
    expected: list[Any] = []

    def log(value: torch.Tensor) -> None:
        """Whatever `item` does here."""
        try:
            number = value.item()
        except RuntimeError:
            number = None
        expected.append(number)
        try:
            run.log({"a": value, "b": 1.0}, update=len(expected))
        except errors.UnsupportedValue as error:
            assert number is None, error
        else:
            assert number is not None

    log(tensor)
    with Doubles():
        log(tensor)
    with torch.device("meta"):
        log(tensor)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        log(tensor)
        log(torch.tensor(3.0))
    log(mode.from_tensor(tensor))

    def of_func(value: torch.Tensor) -> torch.Tensor:
        log(value)
        log(tensor)
        return value * 2

    torch.func.vmap(of_func)(torch.arange(2.0))
    torch.func.grad(of_func)(torch.tensor(4.0))
    torch.func.functionalize(of_func)(torch.tensor(5.0))
    torch.func.jvp(of_func, (torch.tensor(6.0),), (torch.tensor(1.0),))
    run.finish(30)
    entries = torch.load(tmp_path / "r/tracker/entries.th")
    assert entries["a"] == {update: number for update, number in enumerate(expected, 1) if number is not None}
    assert expected[:2] == [3.0, 6.0] and None in expected
    run.close()


def test_a_tensor_whose_memory_is_gone_is_refused(daemon: RunningDaemon, tmp_path: Path) -> None:
    """As a sharded parameter is between two steps: its place in the freed memory is far from the beginning."""
    run = noether_writer.open_run(tmp_path, "r")
    base = torch.zeros(10_000)
    tensor = base[9_999]
    run.log({"a": tensor}, update=1)
    base.untyped_storage().resize_(0)
    with pytest.raises(errors.UnsupportedValue, match="'a' of update 2: a Tensor without a number"):
        run.log({"a": tensor}, update=2)
    run.finish(30)
    assert torch.load(tmp_path / "r/tracker/entries.th") == {"a": {1: 0.0}}
    run.close()


NO_DESCRIPTORS = """
import os, resource, sys, noether_writer
noether_writer.open_run(sys.argv[1], "before").close()
resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
said = []
before = len(os.listdir("/proc/self/fd"))
for free in range(8):
    taken = []
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    for _ in range(free):
        os.close(taken.pop())
    try:
        noether_writer.open_run(sys.argv[1], "r").close()
        said.append("opened")
    except noether_writer.errors.OutOfDescriptors as error:
        assert error.errno == 24, error.errno
        said.append(str(error))
    for descriptor in taken:
        os.close(descriptor)
    if said[-1] != "opened":
        assert len(os.listdir("/proc/self/fd")) <= before, os.listdir("/proc/self/fd")
print(*said, sep="\\n")
"""


def test_a_trainer_without_a_free_descriptor_is_told_so(daemon: RunningDaemon, tmp_path: Path) -> None:
    """The output root is opened by the trainer: if that fails here, the daemon does not take the path as it sees it."""
    result = subprocess.run(
        [sys.executable, "-c", NO_DESCRIPTORS, str(tmp_path)], capture_output=True, text=True, check=True
    )
    said = result.stdout.splitlines()
    refused = (
        "a connection to the daemon needs a descriptor, and this process has none left (`ulimit -n` is 256): close "
        "files, or raise the limit"
    )
    assert set(said) == {refused, "opened"} and said[-1] == "opened", said


REPEATED = """
import sys
from types import SimpleNamespace as N
import noether_writer
counter = N(epoch=0, update=1, sample=1)
log = noether_writer.LogWriter(N(output_root=sys.argv[1], run_id="r", stage_name=None), counter, N(log=print))
log.add_scalar("a", 1)
log.flush()
log.add_scalar("b", 1)
try:
    log.flush()
except AssertionError as error:
    print("refused:", error)
"""


def test_a_repeated_update_is_refused_under_python_o_too(daemon: RunningDaemon, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-O", "-c", "assert False"], check=True)
    result = subprocess.run(
        [sys.executable, "-O", "-c", REPEATED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "refused: update 1 is not larger" in result.stdout


FORKED = """
import os, sys, noether_writer
run = noether_writer.open_run(sys.argv[1], "r")
run.log({"a": 1}, update=1)
child = os.fork()
if child == 0:
    for call in (lambda: run.log({"a": 2}, update=2), lambda: run.save("net", "t", {"a": 1}), run.finish):
        try:
            call()
        except noether_writer.NoetherWriterError:
            pass
        else:
            os._exit(1)
    sys.exit(0)  # with atexit, as a worker that ends by itself
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
run.log({"a": 3}, update=3)
run.save("net", "t", {"a": 1}).wait(30)
run.finish()
"""


def test_a_forked_child_never_writes_on_its_parents_connection(daemon: RunningDaemon, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", FORKED, str(tmp_path)], check=True, timeout=60)
    assert torch.load(tmp_path / "r/tracker/entries.th") == {"a": {1: 1, 3: 3}}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB, all of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", path], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a small file system can't be mounted here: {mounted.stderr.strip()}")
    yield path
    # An ended run must not pin the file system; the daemon lets go a moment after the client.
    deadline = time.monotonic() + 5
    while subprocess.run(["umount", path], capture_output=True).returncode != 0:
        assert time.monotonic() < deadline, "the daemon holds the file system of an ended run"
        time.sleep(0.05)


def test_a_full_disk_stalls_and_loses_nothing(daemon: RunningDaemon, small_disk: Path) -> None:
    filler = small_disk / "filler"
    run = noether_writer.open_run(small_disk, "r")
    filler.write_bytes(bytes(6 << 20))
    weights = torch.randn(1 << 20)
    ticket = run.save("net", "t", {"w": weights})
    with pytest.raises(errors.CheckpointStalled, match="No space left on device"):
        ticket.wait(2)
    assert ticket.accepted and not ticket.done
    # Training goes on: the log, and another save behind the first.
    run.log({"loss": 1.0}, update=1)
    second = run.save("net", "latest", {"w": weights[:10].clone()})
    status = run._session.ask(noether_writer.frames.STATUS, {}, None).json()
    assert "No space left" in status["runs"][0]["stalled"]
    assert not list((small_disk / "r/checkpoints").glob("*.th"))
    filler.unlink()
    ticket.wait(30)
    second.wait(30)
    assert torch.equal(torch.load(ticket.paths[0])["w"], weights)
    run.finish()
    run.close()
    assert sorted(p.name for p in (small_disk / "r/checkpoints").iterdir()) == [
        "net_cp=latest_model.th",
        "net_cp=t_model.th",
    ]


def test_a_failed_save_is_raised_once_beside_its_ticket(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    (tmp_path / "r/checkpoints/net_cp=t_model.th").mkdir()
    ticket = run.save("net", "t", {"a": torch.ones(3)})
    with pytest.raises(errors.StorageError) as raised:
        ticket.wait(30)
    assert raised.value.errno is not None and "net_cp=t_model.th" in str(raised.value)
    # Its ticket says it again; nobody else does, and the next save is done.
    with pytest.raises(errors.StorageError):
        ticket.wait(30)
    run.save("net", "u", {"a": 1}).wait(30)
    unheard = run.save("net", "t", {"a": 1})
    until(lambda: unheard.done)
    with pytest.raises(errors.StorageError):
        run.save("net", "v", {"a": 1})
    run.save("net", "t", {"a": 1})
    with pytest.raises(errors.StorageError):
        run.wait(30)
    run.finish()
    run.close()


@pytest.mark.parametrize("what", ["finish", "ticket", "run"])
def test_no_wait_is_without_end(
    what: str, daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that lives and does nothing: a wait without a timeout says so instead of hanging."""
    for module in (noether_writer.session, noether_writer.saves):
        monkeypatch.setattr(module, "LOOK_SECONDS", 0.5)
    run = noether_writer.open_run(tmp_path, "r")
    os.kill(daemon.process.pid, signal.SIGSTOP)
    try:
        run.log({"a": 1}, update=1)
        ticket = run.save("net", "t", {"a": torch.ones(3)})
        with pytest.raises(errors.DaemonUnavailable, match="has not answered"):
            {"finish": run.finish, "ticket": ticket.wait, "run": run.wait}[what]()
    finally:
        os.kill(daemon.process.pid, signal.SIGCONT)
    run.finish(30)
    run.close()
    assert torch.load(tmp_path / "r/tracker/entries.th") == {"a": {1: 1}}


def test_finish_on_a_full_disk_says_so(
    daemon: RunningDaemon, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noether_writer.session, "LOOK_SECONDS", 0.5)
    run = noether_writer.open_run(small_disk, "r")
    run.log({"a": 1}, update=1)
    filler = small_disk / "filler"
    fd = os.open(filler, os.O_WRONLY | os.O_CREAT)
    with pytest.raises(OSError, match="No space left"):
        while True:
            os.write(fd, bytes(1 << 12))
    os.close(fd)
    with pytest.raises(errors.CheckpointStalled, match="No space left"):
        run.finish()
    filler.unlink()
    run.finish(30)
    run.close()
    assert torch.load(small_disk / "r/tracker/entries.th") == {"a": {1: 1}}


LEAVES = """
import noether_writer, os, signal, sys, torch
run = noether_writer.open_run(sys.argv[1], "r")
os.kill(int(sys.argv[2]), signal.SIGSTOP)
while open(f"/proc/{sys.argv[2]}/stat").read().split()[2] != "T":
    pass
for update in range(1, 8):
    run.log({"a": update}, update=update)
run.save("net", "t", {"a": torch.ones(3)})
if len(sys.argv) > 3:
    sys.stderr = type("Closed", (), {"flush": lambda self: None})()
"""


@pytest.mark.parametrize("more", [[], ["no standard error"]])
def test_a_trainer_that_ends_waits_a_bounded_time_and_says_what_is_not_safe(
    more: list[str], daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOETHER_WRITER_EXIT_TIMEOUT", "1")
    try:
        result = subprocess.run(
            [sys.executable, "-c", LEAVES, str(tmp_path), str(daemon.process.pid), *more],
            capture_output=True,
            text=True,
            timeout=60,
        )
    finally:
        os.kill(daemon.process.pid, signal.SIGCONT)
    assert result.returncode == 0
    words = "lost unless the daemon still takes it: net_cp=t_model.th, the last 7 updates of the log. Older files stay"
    assert words in result.stderr


ASKS = """
import os, sys, noether_writer
run = noether_writer.open_run(sys.argv[1], "r")
run.log({"a": 1}, update=1)
run.values("a")
child = os.fork()
if child == 0:
    for call in (lambda: run.values("a"), lambda: run.entries(0, 1), run.finish):
        try:
            call()
        except noether_writer.NoetherWriterError:
            pass
        else:
            os._exit(1)
    run.close()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert list(run.values("a")) == [1]
run.finish()
"""


def test_a_forked_child_asks_nothing_on_its_parents_connection(daemon: RunningDaemon, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", ASKS, str(tmp_path)], check=True, timeout=60)
