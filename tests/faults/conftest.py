"""The checkpoints of the unit tests."""

from tests.unit.conftest import base, folder, rm_ckpt, sft_ckpt

__all__ = ["base", "folder", "rm_ckpt", "sft_ckpt"]
