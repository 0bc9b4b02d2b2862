"""What tells one machine from another, and where the results of each are kept."""

from __future__ import annotations

import contextlib
import platform
import re
import subprocess
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
    found |= {"memory_bytes": properties.total_memory, "os": platform.platform()}
    return found | {"driver": gpu_state().get("driver")}


# Name: NVML's function and the clock it is asked for, and what nvidia-smi calls the same.
READINGS = {
    "sm_mhz": ("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM", "clocks.sm"),
    "sm_mhz_most": ("nvmlDeviceGetMaxClockInfo", "NVML_CLOCK_SM", "clocks.max.sm"),
    "memory_mhz": ("nvmlDeviceGetClockInfo", "NVML_CLOCK_MEM", "clocks.mem"),
    "milliwatts": ("nvmlDeviceGetPowerUsage", "", "power.draw"),
    "milliwatts_most": ("nvmlDeviceGetEnforcedPowerLimit", "", "enforced.power.limit"),
    "celsius": ("nvmlDeviceGetTemperature", "NVML_TEMPERATURE_GPU", "temperature.gpu"),
}


def gpu_state() -> dict[str, Any]:
    """Driver, clocks, power and temperature just now; in place of what is not known, why."""
    uuid, why = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}", {}
    for name, read in {"nvml": _by_nvml, "nvidia-smi": _by_smi}.items():
        try:
            return read(uuid) | why
        except Exception as error:  # no package, no program, a device that it does not know
            why[name] = f"{type(error).__name__}: {error}"
    return why


def _by_nvml(uuid: str) -> dict[str, Any]:
    import pynvml as nvml

    nvml.nvmlInit()
    card = nvml.nvmlDeviceGetHandleByUUID(uuid)
    state: dict[str, Any] = {"driver": nvml.nvmlSystemGetDriverVersion()}
    for name, (function, clock, _) in READINGS.items():
        which = [getattr(nvml, clock)] if clock else []
        try:
            state[name] = getattr(nvml, function)(card, *which)
        except nvml.NVMLError as error:
            state[name] = str(error)
    return state


def _by_smi(uuid: str) -> dict[str, Any]:
    fields = ["driver_version", *(field for _, _, field in READINGS.values())]
    command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(fields)}"]
    command.append("--format=csv,noheader,nounits")
    values = subprocess.check_output(command, text=True, timeout=20).strip().split(", ")
    state: dict[str, Any] = dict(zip(["driver", *READINGS], values, strict=True))
    for name in READINGS:
        with contextlib.suppress(ValueError):  # "[N/A]"
            state[name] = round(float(state[name]) * (1000 if name.startswith("milli") else 1))
    return state
