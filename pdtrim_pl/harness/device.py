"""The device of an evaluation."""

import torch


def present_device(device: str | None) -> str:
    """A device that this machine has: a GPU if there is one and no other is named.

    Without a GPU the command `lm_eval` asks for one too, and its own model then takes the CPU.
    """
    if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device
