# SPDX-License-Identifier: Apache-2.0
"""`python -m noether_writer.bridges wandb|mlflow|trackio [RUN|DIR]`: uploads logs to a tracker, outside the trainer."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

from ..errors import NoetherWriterError
from ._follower import Options
from ._mlflow import Mlflow
from ._runs import Chosen, Work
from ._tracker import Tracker, Voice
from ._trackio import Trackio
from ._wandb import Wandb

TRACKERS: dict[str, type[Tracker]] = {kind.name: kind for kind in (Wandb, Mlflow, Trackio)}

_TEXT = """Uploads the logs of runs to an experiment tracker, from a process of its own: each row once, in order, with
its update as the step and with its time, and the hyperparameters. It may be killed at any moment and started again."""

_END = """RUN is a run's directory, or the id of a run that the daemon has: the bridge leaves when the run has ended and
everything is uploaded. DIR is a directory with runs below it, also new ones and ended ones: the bridge continues until
it is stopped (SIGTERM or Ctrl-C). Without either, it follows all runs that the daemon has.

Where the tracker is, its own variables say: WANDB_MODE, WANDB_API_KEY, WANDB_ENTITY, WANDB_DIR; MLFLOW_TRACKING_URI;
TRACKIO_DIR."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m noether_writer.bridges",
        description=_TEXT,
        epilog=_END,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tracker", choices=list(TRACKERS))
    parser.add_argument("place", nargs="?", metavar="RUN|DIR")
    parser.add_argument(
        "--project",
        help="the tracker's project or experiment, for runs that it does not have yet (the tracker's own variable, or "
        "else the name of the directory above the run)",
    )
    parser.add_argument("--once", action="store_true", help="leave when all runs that are there have ended")
    parser.add_argument(
        "--state",
        type=Path,
        metavar="DIRECTORY",
        help="where to note what was uploaded (tracker/bridges in each run's directory)",
    )
    given = parser.parse_args(arguments)
    voice = Voice(given.tracker)
    try:
        kind = TRACKERS[given.tracker]
        kind.check()
        chosen = Chosen(given.place)
    except NoetherWriterError as error:
        voice.say(str(error.args[0]) if error.args else str(error))
        return 1
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    once = given.once or chosen.is_one
    options = Options(given.project, given.state, waits=not once)
    return 0 if Work(chosen, kind, options, once, stop).do() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
