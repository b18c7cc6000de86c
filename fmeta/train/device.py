"""Which device a run takes."""

from __future__ import annotations

import torch

from fmeta.parallel import ALONE, Processes


def pick_device(name: str, processes: Processes = ALONE) -> torch.device:
    """The device that an option names; of several processes each takes a GPU of its own.

    Raises:
        ValueError: for a name that torch does not know, or a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if processes.size > 1 and name.startswith("cuda:"):
        raise ValueError(
            f"train: --device must be auto, cpu or cuda for {processes.size} processes, got {name}. Each takes "
            "the GPU of its own number; choose among them with CUDA_VISIBLE_DEVICES."
        )
    if processes.size > 1 and name == "cuda":
        name = f"cuda:{processes.local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"train: --device must be auto, cpu, cuda or cuda:N, got {name!r}.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"train: --device is {name}, but torch sees {torch.cuda.device_count()} CUDA devices. "
            "Use --device auto or cpu."
        )
    if processes.size > 1 and device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL works on the current one
    return device
