"""Imported once by the server that forks the short chains' processes: most of a start's seconds are imports."""

import lit_instruct.callbacks
import lit_instruct.data.modules
import lit_instruct.modules.ppo
import lit_instruct.modules.reward
import lit_instruct.modules.sft
import lit_instruct.modules.stage_cli
import tests.faults.witness  # noqa: F401
