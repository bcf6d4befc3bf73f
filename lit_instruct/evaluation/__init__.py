"""Comparing models: win rates with intervals, distance from a reference, the paper's own protocols.

What a configuration names stands here: judges and protocols, each as ``lit_instruct.evaluation.NAME``.
"""

from lit_instruct.evaluation.evaluate import evaluate
from lit_instruct.evaluation.harness import Harness
from lit_instruct.evaluation.judges import HumanChoices, Judge, PairJudge
from lit_instruct.evaluation.protocols import BiasEntropy, Continuations, MultipleChoice, Protocol
from lit_instruct.evaluation.subjects import ModelSource

__all__ = [
    "BiasEntropy",
    "Continuations",
    "Harness",
    "HumanChoices",
    "Judge",
    "ModelSource",
    "MultipleChoice",
    "PairJudge",
    "Protocol",
    "evaluate",
]
