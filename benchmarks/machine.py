"""What tells one machine from another, and where the results of each are kept."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).with_name("results")


def results_path(question: str, machine: Mapping[str, Any], folder: Path) -> Path:
    """A file that no other machine shares.

    The names of CPUs do not tell them apart: in virtual machines three generations are "AMD EPYC".
    """
    if "gpu" in machine:
        facts = [machine["gpu"]]
    else:
        facts = [machine.get("model") or machine["cpu"], machine["isa"], *machine["caches"]]
        facts.append(f"{machine['cores']} cores")
    slug = re.sub(r"[^a-z0-9]+", "-", " ".join(facts).lower()).strip("-")
    return folder / f"{question}-{slug}.json"


def gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    capability = f"{properties.major}.{properties.minor}"
    found = {"gpu": properties.name, "capability": capability, "cuda": torch.version.cuda}
    found |= {"sms": properties.multi_processor_count, "l2_bytes": properties.L2_cache_size}
    return found | {"memory_bytes": properties.total_memory, "os": platform.platform()}


def gpu_state() -> dict[str, Any]:
    """Clocks, power and temperature just now; in place of what is not known, why."""
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        card = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
    except Exception as error:  # no package, no driver, a device that NVML does not know
        return {"nvml": f"{type(error).__name__}: {error}"}
    asked = {
        "driver": (nvml.nvmlSystemGetDriverVersion,),
        "sm_mhz": (nvml.nvmlDeviceGetClockInfo, card, nvml.NVML_CLOCK_SM),
        "sm_mhz_most": (nvml.nvmlDeviceGetMaxClockInfo, card, nvml.NVML_CLOCK_SM),
        "memory_mhz": (nvml.nvmlDeviceGetClockInfo, card, nvml.NVML_CLOCK_MEM),
        "milliwatts": (nvml.nvmlDeviceGetPowerUsage, card),
        "milliwatts_most": (nvml.nvmlDeviceGetEnforcedPowerLimit, card),
        "celsius": (nvml.nvmlDeviceGetTemperature, card, nvml.NVML_TEMPERATURE_GPU),
    }
    state: dict[str, Any] = {}
    for name, (ask, *arguments) in asked.items():
        try:
            state[name] = ask(*arguments)
        except nvml.NVMLError as error:
            state[name] = str(error)
    return state
