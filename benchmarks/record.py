"""How a benchmark records its figures: indented JSON, with the machine and versions they were made with."""

import json
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax


def processor() -> str:
    """The name of the processor, where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def machine(*others: str) -> dict[str, Any]:
    """What the figures were made with; `others` are packages that took part beside the usual ones."""
    packages = ("jax", "jaxlib", "numpy", "flax", "optax", "lip_jax", *others)
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "jax_devices": [device.device_kind for device in jax.devices()],
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
    }


def write_json(record: dict[str, Any], path: Path) -> None:
    """Indented JSON with each list of numbers on one line."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[^\[\]{}\"]+\]", lambda numbers: " ".join(numbers[0].split()), text)
    path.write_text(text + "\n", encoding="utf-8")
