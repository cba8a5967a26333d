# SPDX-License-Identifier: Apache-2.0
"""Bridges to experiment trackers, in a process of their own: `python -m noether_writer.bridges wandb|mlflow|trackio`.

A bridge follows runs as any reader does, and uploads each row once, in order, with its step and its time. It imports
its tracker when it is started, and no other one. A trainer knows nothing of it.
"""
