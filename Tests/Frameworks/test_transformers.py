# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from harness import Daemon

transformers = pytest.importorskip("transformers")
from noether_writer import _files, _safetensors  # noqa: E402
from noether_writer.transformers import Callback, TrainerMixin  # noqa: E402
from transformers.trainer_utils import get_last_checkpoint  # noqa: E402

Script = Callable[..., subprocess.CompletedProcess[str]]


class Ours(TrainerMixin, transformers.Trainer):
    pass


def model() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=2
    )
    return transformers.BertForSequenceClassification(config)


def data() -> list[dict[str, Any]]:
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(0, 20, (6,)), "labels": index % 2} for index in range(32)]


def arguments(root: Path, **more: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(root),
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return transformers.TrainingArguments(**(settings | more))


def content(folder: Path) -> dict[str, Any]:
    """The files of a checkpoint, by their names."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            found[path.name] = safetensors.torch.load_file(path)
        elif path.suffix in (".pt", ".pth"):
            found[path.name] = torch.load(path, weights_only=False)
        elif path.suffix == ".json":
            found[path.name] = json.loads(path.read_text())
        else:
            found[path.name] = None
    return found


def test_checkpoints_are_those_of_transformers(daemon: Daemon, tmp_path: Path) -> None:
    folders = []
    for name, kind in (("own", transformers.Trainer), ("ours", Ours)):
        transformers.set_seed(3)
        trainer = kind(model(), arguments(tmp_path / name, save_total_limit=3), train_dataset=data())
        trainer.train()
        folders.append(tmp_path / name)
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1] == ["checkpoint-10", "checkpoint-12", "checkpoint-8"]
    for name in names[0]:
        own, ours = (content(folder / name) for folder in folders)
        assert own.keys() == ours.keys()
        for file in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
            torch.testing.assert_close(own[file], ours[file], rtol=0, atol=0)
        for file in ("config.json",):
            assert own[file] == ours[file]
        own_state, our_state = own["trainer_state.json"], ours["trainer_state.json"]
        assert own_state["global_step"] == our_state["global_step"] and own_state["log_history"].__len__() == len(
            our_state["log_history"]
        )


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import transformers
from pathlib import Path
from test_transformers import Ours, arguments, data, model
from noether_writer.transformers import Callback

class Dies(transformers.TrainerCallback):
    def on_save(self, args, state, control, **more):
        if state.global_step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

transformers.set_seed(3)
trainer = Ours(model(), arguments(Path.cwd() / "out"), train_dataset=data(), callbacks=[Callback("runs", "r"), Dies()])
trainer.train(resume_from_checkpoint=True)
print(trainer.state.global_step)
"""


def test_a_killed_training_resumes_from_a_whole_checkpoint(daemon: Daemon, run_script: Script, tmp_path: Path) -> None:
    here = Path(__file__).parent
    for dies_at in (6, 10):
        result = run_script(KILLED, here, dies_at)
        assert result.returncode == -signal.SIGKILL, result.stderr
        for path in (tmp_path / "out").glob("checkpoint-*"):
            assert content(path)["trainer_state.json"]["global_step"] == int(path.name.partition("-")[2])
    result = run_script(KILLED, here, 0)
    assert (result.returncode, result.stdout.split()[-1]) == (0, "12"), result.stderr
    transformers.set_seed(3)
    whole = transformers.Trainer(model(), arguments(tmp_path / "whole"), train_dataset=data())
    whole.train()
    ours = content(tmp_path / "out/checkpoint-12")
    own = content(tmp_path / "whole/checkpoint-12")
    torch.testing.assert_close(ours["model.safetensors"], own["model.safetensors"], rtol=0, atol=0)
    torch.testing.assert_close(ours["optimizer.pt"], own["optimizer.pt"], rtol=0, atol=0)
    # Nothing half done is left.
    assert not list((tmp_path / "out").glob(".checkpoint-*"))
    assert list(torch.load(tmp_path / "runs/r/tracker/entries.th")["loss"]) == list(range(1, 13))


def test_a_checkpoint_appears_whole(daemon: Daemon, tmp_path: Path) -> None:
    trainer = Ours(model(), arguments(tmp_path, max_steps=2), train_dataset=data())
    seen = []

    class Holds(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step == 1:
                daemon.hold()

        def on_save(self, *_: Any, **__: Any) -> None:
            seen.append(sorted(path.name for path in tmp_path.iterdir()))
            daemon.go_on()

    trainer.add_callback(Holds())
    trainer.train()
    [names] = seen
    # Training had its checkpoint behind it, and nothing could be taken for one.
    assert len(names) == 1 and names[0].startswith(".checkpoint-2.partial-")
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")


def test_the_best_one_is_kept_and_loaded(daemon: Daemon, tmp_path: Path) -> None:
    settings = arguments(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_score",
        greater_is_better=True,
    )
    scores = iter([1.0, 5.0, 2.0, 1.0, 0.5, 0.2])
    trainer = Ours(
        model(), settings, train_dataset=data(), eval_dataset=data(), compute_metrics=lambda _: {"score": next(scores)}
    )
    trainer.train()
    # With a limit of one, transformers keeps only the best at the end.
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    best = safetensors.torch.load_file(tmp_path / "checkpoint-4/model.safetensors")
    torch.testing.assert_close(dict(trainer.model.state_dict()) | best, dict(trainer.model.state_dict()))


def test_a_second_training_takes_the_place_of_a_checkpoint(daemon: Daemon, tmp_path: Path) -> None:
    for width in (1, 2):
        transformers.set_seed(width)
        Ours(model(), arguments(tmp_path, max_steps=2), train_dataset=data()).train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert content(tmp_path / "checkpoint-2")["trainer_state.json"]["global_step"] == 2


def test_a_callback_never_ends_a_training(daemon: Daemon, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    trainer = Ours(
        model(), arguments(tmp_path / "out"), train_dataset=data(), callbacks=[Callback(tmp_path / "file", "r")]
    )
    trainer.train()
    assert "opening the run" in caplog.text and trainer.state.global_step == 12


DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
]


def test_safetensors_bytes(daemon: Daemon, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {f"é{index}.{dtype}": torch.randint(0, 9, (index, 3)).to(dtype) for index, dtype in enumerate(DTYPES)}
    state |= {"long": torch.arange(5), "bool": torch.tensor([True, False]), "scalar": torch.tensor(1.5)}
    odd = {"f8": torch.ones(4).to(torch.float8_e4m3fn), "w": torch.ones(3)}
    for name, tensors, metadata in (
        ("a", state, {"format": "pt", "x": "é"}),
        ("none", {}, None),
        ("one", {"w": torch.nn.Parameter(torch.ones(3))}, None),
        ("odd", odd, {"format": "pt"}),
    ):
        path = tmp_path / f"{name}.safetensors"
        _safetensors.save_file(tensors, path, metadata).wait()
        own = {key: value.detach() for key, value in tensors.items()}
        assert path.read_bytes() == safetensors.torch.save(own, metadata)
    shared = torch.ones(4)
    with pytest.raises(RuntimeError, match="share memory"):
        _safetensors.save_file({"a": shared, "b": shared[:2]}, tmp_path / "shared.safetensors")
    _files.wait()
