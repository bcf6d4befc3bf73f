"""The peers' virtual environments: TRL 1.16 for SFT and reward model; 1.10, which still has a PPO trainer, for PPO."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

TORCH = "2.13.0"
PEERS = {"trl": ["trl==1.16.0", "transformers==5.24.0"], "trl-ppo": ["trl==1.10.0", "transformers==5.23.0"]}


def python_of(name: str, folder: Path) -> Path:
    """The interpreter of a side; its environment is made if it is not there.

    Args:
        name: ``own``, ``trl`` or ``trl-ppo``.
        folder: where the environments lie.

    Returns:
        Path of the interpreter.
    """
    if name == "own" or (name == "trl" and _has_release(Path(sys.executable), PEERS["trl"][0])):
        return Path(sys.executable)  # the tests compare with the same release, so it may be here already
    home = folder / name
    python, mark = home / "bin" / "python", home / ".complete"
    wanted = " ".join([TORCH, *PEERS[name]])
    if not mark.is_file() or mark.read_text(encoding="utf-8") != wanted:
        print(f"Installing {' and '.join(PEERS[name])} into {home} (some minutes, once) ...", flush=True)
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        _install_torch(pip)
        subprocess.run([*pip, f"torch=={TORCH}", *PEERS[name]], check=True)
        mark.write_text(wanted, encoding="utf-8")
    return python


def versions(python: Path) -> dict[str, str]:
    """Releases that an environment has."""
    names = ("torch", "transformers", "trl", "lightning", "accelerate")
    code = (
        "import importlib.metadata as m, json\n"
        f"have = {{d.metadata['Name'].lower(): d.version for d in m.distributions()}}\n"
        f"print(json.dumps({{n: have[n] for n in {names!r} if n in have}}))"
    )
    done = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _install_torch(pip: list[str]) -> None:
    if platform.system() == "Linux":
        # The default build brings several GB of CUDA libraries; the benchmark runs on the processor.
        index = ["--no-deps", "--extra-index-url", "https://download.pytorch.org/whl/cpu"]
        if subprocess.run([*pip, "--retries", "0", *index, f"torch=={TORCH}+cpu"], check=False).returncode == 0:
            return
    subprocess.run([*pip, f"torch=={TORCH}"], check=True)


def _has_release(python: Path, requirement: str) -> bool:
    name, version = requirement.split("==")
    return versions(python).get(name) == version
