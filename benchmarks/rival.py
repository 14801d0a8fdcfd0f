"""The rival of the offline companion, in a virtual environment of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

RIVAL = "llmcompressor==0.14.0.1"


def rival_python(environment: Path) -> Path:
    """Return the interpreter of the rival's ``environment``, which is made first where there is none."""
    python = environment / "bin" / "python"
    done = environment / "complete"  # else an installation that was cut short would count as one
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        # The same torch as here first: both sides then multiply with the same libraries.
        for package in (f"torch=={torch.__version__.partition('+')[0]}", RIVAL):
            subprocess.run([python, "-m", "pip", "install", "-q", package], check=True)
        done.touch()
    return python
