# SPDX-License-Identifier: Apache-2.0
"""Joining a cluster: the address is passed on, and too few devices are an error."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vllm_dlm.ray_cluster import connect

RESOURCES = """
import os, ray
ray.init(log_to_driver=False)
print("GPUs", int(ray.cluster_resources()["GPU"]))
print("niceness", ray.get(ray.remote(lambda: os.nice(0)).remote()), "here", os.nice(0))
"""


@pytest.mark.parametrize("devices", [0, -1])
def test_devices_must_be_positive(devices: int):
    with pytest.raises(ValueError, match=f"at least 1, got {devices}"):
        connect(devices)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_processes_join_and_devices_are_counted():
    address = os.environ["RAY_ADDRESS"]
    connect(devices=4)
    assert os.environ["RAY_ADDRESS"] == address
    child = subprocess.run(
        [sys.executable, "-c", RESOURCES], capture_output=True, text=True, check=True
    )
    assert "GPUs 4" in child.stdout
    # On a CPU, a worker takes its turn as any process.
    assert f"niceness {os.nice(0)} here {os.nice(0)}" in child.stdout
    with pytest.raises(ValueError, match=r"has 4 GPUs, and 5 are wanted.*--num-gpus=5"):
        connect(devices=5)
