# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import Daemon

L = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from noether_writer.errors import NoetherWriterError  # noqa: E402
from noether_writer.lightning import CheckpointIO, Logger  # noqa: E402

Script = Callable[..., subprocess.CompletedProcess[str]]


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        self.log("lr", 0.1, on_epoch=True)
        return loss

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("val", self.layer(batch).square().mean())

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def data() -> torch.utils.data.DataLoader[torch.Tensor]:
    torch.manual_seed(0)
    return torch.utils.data.DataLoader(torch.randn(32, 4), batch_size=8)  # type: ignore[arg-type]


def trainer(
    root: Path, io: CheckpointIO | None, *callbacks: L.Callback, epochs: int = 3, logger: object = False
) -> L.Trainer:
    return L.Trainer(
        default_root_dir=str(root),
        max_epochs=epochs,
        callbacks=list(callbacks),
        plugins=[] if io is None else [io],
        logger=logger,  # type: ignore[arg-type]
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )


def test_a_fit_leaves_what_lightnings_own_io_leaves(daemon: Daemon, tmp_path: Path) -> None:
    files = []
    for name, io in (("own", None), ("ours", CheckpointIO())):
        L.seed_everything(1, verbose=False)
        keep = ModelCheckpoint(tmp_path / name, monitor="val", save_top_k=2, save_last=True)
        fit = trainer(tmp_path / name, io, keep)
        fit.fit(Model(), data(), data())
        # The fit has torn its strategy down: everything is durable.
        found = {path.name: torch.load(path, weights_only=False) for path in (tmp_path / name).glob("*.ckpt")}
        files.append(found)
    assert files[0].keys() == files[1].keys() and len(files[0]) == 3
    for name, own in files[0].items():
        ours = files[1][name]
        assert own.keys() == ours.keys()
        for key in ("state_dict", "optimizer_states", "epoch", "global_step", "loops"):
            torch.testing.assert_close(own[key], ours[key], rtol=0, atol=0)


def test_the_old_one_goes_after_the_new_one_is_durable(daemon: Daemon, tmp_path: Path) -> None:
    io = CheckpointIO()
    old, new = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    io.save_checkpoint({"x": 1}, old)
    io.teardown()
    daemon.hold()
    io.save_checkpoint({"x": 2}, new)
    io.remove_checkpoint(old)
    daemon.kill()
    # Neither was the new one written, nor the old one removed; the next daemon is sent both.
    assert old.exists() and not new.exists()
    daemon.start()
    io.teardown()
    assert not old.exists() and torch.load(new) == {"x": 2}


def test_the_old_one_stays_if_the_new_one_fails(daemon: Daemon, tmp_path: Path) -> None:
    io = CheckpointIO()
    old, gone = tmp_path / "old.ckpt", tmp_path / "gone" / "new.ckpt"
    io.save_checkpoint({"x": 1}, old)
    io.teardown()
    daemon.hold()
    io.save_checkpoint({"x": 2}, gone)
    io.remove_checkpoint(old)
    gone.parent.rmdir()
    gone.parent.write_text("in its place")
    daemon.go_on()
    # Two failures, each told once: the save, and the removal that waited for it.
    for words in (r"/gone: Not a directory", r"old\.ckpt, which stays, since .*new\.ckpt is missing"):
        with pytest.raises(NoetherWriterError, match=words):
            io.teardown()
    io.teardown()
    assert old.exists()


def test_loading_waits_for_a_save_that_is_on_its_way(daemon: Daemon, tmp_path: Path) -> None:
    io = CheckpointIO()
    io.save_checkpoint({"x": torch.ones(1 << 22)}, tmp_path / "a.ckpt")
    loaded = io.load_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(loaded["x"], torch.ones(1 << 22))
    with pytest.raises(FileNotFoundError, match="Checkpoint file not found"):
        io.load_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(TypeError, match="storage_options"):
        io.save_checkpoint({}, tmp_path / "b.ckpt", storage_options={})


@pytest.mark.parametrize("save_last", [True, "link"])
def test_best_and_last_are_loaded_after_a_fit(save_last: bool | str, daemon: Daemon, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="step", mode="max", save_last=save_last)  # type: ignore[arg-type]
    fit = trainer(tmp_path, CheckpointIO(), keep)
    fit.fit(Model(), data(), data())
    fit.test(ckpt_path="best", dataloaders=data(), verbose=False)
    assert torch.load(tmp_path / "last.ckpt", weights_only=False)["epoch"] == 2
    more = trainer(tmp_path, CheckpointIO(), epochs=5)
    more.fit(Model(), data(), data(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert more.current_epoch == 5


def test_the_log_of_a_fit(daemon: Daemon, tmp_path: Path) -> None:
    log = Logger(tmp_path, "exp")
    log.log_hyperparams({"width": 4})
    fit = trainer(tmp_path, None, logger=log)
    fit.fit(Model(), data(), data())
    assert log.version == "version_0" and log.log_dir == str(tmp_path / "exp/version_0")
    entries = torch.load(tmp_path / "exp/version_0/tracker/entries.th")
    assert list(entries["loss"]) == list(range(12)) and len(entries["val"]) == 3
    assert "width: 4" in (tmp_path / "exp/version_0/tracker/config.yaml").read_text()
    assert Logger(tmp_path, "exp").version == "version_1"
    # A second fit of the same trainer continues the log.
    fit.fit_loop.max_epochs = 5
    fit.fit(Model(), data(), data())
    entries = torch.load(tmp_path / "exp/version_0/tracker/entries.th")
    assert list(entries["loss"]) == list(range(20))
    assert log.experiment is not None
    log.experiment.close()


def test_a_resumed_fit_continues_its_log(daemon: Daemon, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, save_last=True)
    log = Logger(tmp_path, "exp", "a")
    trainer(tmp_path, CheckpointIO(), keep, epochs=2, logger=log).fit(Model(), data())
    assert log.experiment is not None
    log.experiment.close()
    log = Logger(tmp_path, "exp", "a")
    trainer(tmp_path, CheckpointIO(), epochs=3, logger=log).fit(Model(), data(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert list(torch.load(tmp_path / "exp/a/tracker/entries.th")["loss"]) == list(range(12))
    assert log.experiment is not None
    log.experiment.close()


def test_a_logger_never_ends_a_training(daemon: Daemon, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = Logger(tmp_path, "exp", "a")
    for _ in range(3):
        log.log_metrics({"image": torch.ones(3), "loss": 1.0}, 5)
        log.log_metrics({"loss": 1.0}, 3)
        log.log_metrics({"object": object()}, 6)
    assert sum("image" in record.getMessage() for record in caplog.records) == 1
    assert sum("update 3" in record.getMessage() for record in caplog.records) == 1
    log.log_hyperparams({"late": 1})
    log.finalize("success")
    assert torch.load(tmp_path / "exp/a/tracker/entries.th")["loss"] == {5: 1.0}
    assert log.experiment is not None
    log.experiment.close()
    # A file in the place of the directory.
    (tmp_path / "file").write_text("")
    refused = Logger(tmp_path / "file", "exp", "a")
    refused.log_metrics({"loss": 1.0}, 1)
    refused.finalize("success")
    assert refused.experiment is None


KILLED = """
import os, signal, sys, torch, lightning.pytorch as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
sys.path.insert(0, sys.argv[1])
from test_lightning import Model, data, trainer
from noether_writer.lightning import CheckpointIO
from pathlib import Path

class Dies(Callback):
    def on_train_batch_end(self, trainer, *_):
        # With checkpoints on their way.
        if trainer.global_step == 11:
            os.kill(os.getpid(), signal.SIGKILL)

keep = ModelCheckpoint(Path.cwd(), every_n_train_steps=1, save_top_k=1, monitor="step", mode="max", filename="{step}")
trainer(Path.cwd(), CheckpointIO(), keep, Dies()).fit(Model(), data())
"""


def test_a_killed_training_leaves_whole_checkpoints(daemon: Daemon, run_script: Script, tmp_path: Path) -> None:
    result = run_script(KILLED, Path(__file__).parent)
    assert result.returncode == -signal.SIGKILL, result.stderr
    # What was accepted is written all the same, and the file of the newest state is there.
    daemon.stop()
    found = {path: torch.load(path, weights_only=False)["global_step"] for path in tmp_path.glob("*.ckpt")}
    assert found and max(found.values()) >= 9
