"""Imported once by the server that forks the short chains' processes: most of a start's seconds are imports."""

from lit_instruct import callbacks, data
from lit_instruct.modules import ppo, reward, sft, stage_cli
from tests.faults import witness

__all__ = ["callbacks", "data", "ppo", "reward", "sft", "stage_cli", "witness"]
