# SPDX-License-Identifier: Apache-2.0
"""Joining a Ray cluster, or starting one on this machine, for engines on many devices.

vLLM joins the cluster of RAY_ADDRESS, from a process of its own. Without that address
it starts a second cluster, and where that has too few devices it waits for half an
hour. So this module sets the address and counts the devices first.

Ray schedules by counted resources. On a CPU build of vLLM a device is a "GPU" that
exists in Ray's books alone (see `platform.py`).
"""

from __future__ import annotations

import os


def connect(devices: int) -> None:
    """Join the Ray cluster that is there, or start one that ends with this process.

    A cluster is there if RAY_ADDRESS names it or `ray start` has started it on this
    machine. A cluster started here has the machine's GPUs, or, with a CPU build of
    vLLM, `devices` logical ones. RAY_ADDRESS is set, for child processes.

    Args:
        devices: how many GPUs, logical or real, all engines together will take.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ValueError: `devices` is below 1, or more than the cluster has. A cluster that
            grows on demand has to be joined with `ray.init()` instead.
    """
    if devices < 1:
        raise ValueError(f"devices must be at least 1, got {devices}")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Ray is not installed; pip install 'vllm-dlm[ray]'", name="ray"
        ) from error
    from vllm.platforms import current_platform

    if not ray.is_initialized():
        try:
            ray.init("auto")
        except ConnectionError:
            if os.environ.get("RAY_ADDRESS", "auto") != "auto":
                raise
            on_cpu = current_platform.is_cpu()
            # Ray Data and Ray Serve also count cores: one for each engine, some more
            # for the rest. A small machine shares its cores.
            cores = max(os.cpu_count() or 1, 2 * devices + 2) if on_cpu else None
            if on_cpu:
                # Ray lets workers give way to other processes: here, the model.
                os.environ.setdefault("RAY_worker_niceness", "0")
            ray.init(
                "local",
                num_cpus=cores,
                num_gpus=devices if on_cpu else None,
                include_dashboard=False,
            )
    address = ray.get_runtime_context().gcs_address
    os.environ["RAY_ADDRESS"] = address
    found = int(ray.cluster_resources().get("GPU", 0))
    if found < devices:
        raise ValueError(
            f"the Ray cluster at {address} has {found} GPUs, and {devices} are wanted: "
            "take fewer, or add nodes. Nodes without GPUs need logical ones: "
            f"ray start --num-gpus={devices}"
        )
