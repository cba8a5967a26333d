# SPDX-License-Identifier: Apache-2.0
"""The main job on a real torch model: a small autoencoder of two submodels is trained through the drop-in writers, with
EMA and a frozen part, against a daemon of its own. Ends with the files, a reload of each, and the loss curve."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from noether_writer import CheckpointWriter, LogWriter

UPDATES, EPOCH_UPDATES, BATCH = 3000, 500, 64


class Part(torch.nn.Sequential):
    """A submodel as Noether has them: a name, an optimizer of its own or none, frozen or not."""

    def __init__(self, name: str, *layers: torch.nn.Module, frozen: bool = False) -> None:
        super().__init__(*layers)
        self.name, self.is_frozen = name, frozen
        self.requires_grad_(not frozen)
        self.optimizer = None if frozen else torch.optim.Adam(self.parameters(), lr=2e-3)


class Counter:
    epoch = update = sample = 0

    @property
    def cur_iteration(self) -> dict[str, int]:
        return {"epoch": self.epoch, "update": self.update, "sample": self.sample}


def curve(values: list[float], width: int = 72, height: int = 12) -> str:
    """A log-scale curve in braille dots, 2 x 4 a character."""
    columns = [values[i * len(values) // (2 * width)] for i in range(2 * width)]
    logs = [math.log10(value) for value in columns]
    low, high = min(logs), max(logs)
    cells = [[0] * width for _ in range(height)]
    dots = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
    for x, value in enumerate(logs):
        y = round((high - value) / (high - low) * (4 * height - 1))
        cells[y // 4][x // 2] |= dots[x % 2][y % 4]
    lines = ["".join(chr(0x2800 + cell) for cell in row) for row in cells]
    lines[0] += f"  {10**high:.3g}"
    lines[-1] += f"  {10**low:.3g}"
    return "\n".join(lines)


def train(root: Path) -> None:
    torch.manual_seed(0)
    encoder = Part("encoder", torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 4))
    decoder = Part("decoder", torch.nn.Linear(4, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))
    mixing = Part("mixing", torch.nn.Linear(4, 32), frozen=True)
    model = SimpleNamespace(name="ae", submodels={"encoder": encoder, "decoder": decoder, "mixing": mixing})
    ema = {name: value.clone() for name, value in encoder.state_dict().items()}
    counter = Counter()
    provider = SimpleNamespace(output_root=root, run_id="demo", stage_name=None, debug=False)
    trainer = SimpleNamespace(state_dict=lambda: {"training_iteration": counter.cur_iteration})
    checkpoints = CheckpointWriter(provider, counter)
    log = LogWriter(provider, counter, SimpleNamespace(log=lambda _: None))
    stalls = []
    for update in range(1, UPDATES + 1):
        counter.update, counter.sample = update, update * BATCH
        counter.epoch = update // EPOCH_UPDATES
        data = torch.tanh(mixing(torch.randn(BATCH, 4)))
        loss = torch.nn.functional.mse_loss(decoder(encoder(data)), data)
        loss.backward()
        for part in (encoder, decoder):
            part.optimizer.step()
            part.optimizer.zero_grad()
        for name, value in encoder.state_dict().items():
            ema[name].lerp_(value, 0.01)
        log.add_scalar("loss/train", loss.detach())
        log.add_scalar("lr", 2e-3)
        log.flush()
        if update % EPOCH_UPDATES == 0:
            start = time.perf_counter()
            tag = f"E{counter.epoch}_U{counter.update}_S{counter.sample}"
            checkpoints.save(model, tag, trainer, save_optim=False, save_latest_weights=True, save_latest_optim=True)
            checkpoints.save_model_checkpoint("ae.encoder", "latest", ema, model_info="ema=0.99", ema=0.99)
            stalls.append(time.perf_counter() - start)
    losses = log.get_all_metric_values("loss/train")
    log.finish()
    checkpoints.wait(60)
    print(
        f"{UPDATES} updates; each of {len(stalls)} saves held the loop for {1e3 * sorted(stalls)[3]:.1f} ms (median)\n"
    )
    for path in sorted((root / "demo").rglob("*.th")):
        content = torch.load(path, weights_only=True)
        print(f"{path.stat().st_size:>9,} B  {path.relative_to(root)}  loads: {', '.join(map(str, list(content)[:4]))}")
    print(f"\nloss/train, {UPDATES} updates, log scale")
    print(curve(losses))


def main() -> None:
    root = Path(".demo").absolute()
    root.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="nw-") as directory:
        os.environ["NOETHER_WRITER_SOCKET"] = f"{directory}/socket"
        daemon = subprocess.Popen([os.environ["NOETHER_WRITER_DAEMON"], "--socket", f"{directory}/socket"])
        try:
            while not Path(f"{directory}/socket").exists() and daemon.poll() is None:
                time.sleep(0.01)
            train(root)
        finally:
            daemon.send_signal(signal.SIGTERM)
            status = daemon.wait(60)
    sys.exit(status)


if __name__ == "__main__":
    main()
