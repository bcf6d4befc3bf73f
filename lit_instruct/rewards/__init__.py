"""Where the scores of responses come from; each is named in a configuration as ``lit_instruct.rewards.NAME``."""

from lit_instruct.rewards.base import Scorer, WeightedSum
from lit_instruct.rewards.classifier import ClassifierScorer
from lit_instruct.rewards.function import FunctionScorer
from lit_instruct.rewards.http import HttpScorer
from lit_instruct.rewards.reward_model import RewardModelScorer

__all__ = ["ClassifierScorer", "FunctionScorer", "HttpScorer", "RewardModelScorer", "Scorer", "WeightedSum"]
