"""A small seeded world of simple English in which a language model is pretrained, taught and aligned in minutes.

``ToyWorld(seed)`` holds the facts; documents, prompts, demonstrations, the gold score and the labelers are
functions of it. Nothing is downloaded.
"""

from lit_instruct.toyworld.demonstrations import write_demonstration, write_response
from lit_instruct.toyworld.documents import write_documents
from lit_instruct.toyworld.gold import Assessment, assess
from lit_instruct.toyworld.labelers import Labeler, calibrate_noise, make_labelers, measure_agreement
from lit_instruct.toyworld.scorer import GoldScorer
from lit_instruct.toyworld.tasks import Task, split_of_owner
from lit_instruct.toyworld.tokenizer import build_tokenizer
from lit_instruct.toyworld.world import ToyWorld
from lit_instruct.toyworld.writing import write_jsonl, write_world

__all__ = [
    "Assessment",
    "GoldScorer",
    "Labeler",
    "Task",
    "ToyWorld",
    "assess",
    "build_tokenizer",
    "calibrate_noise",
    "make_labelers",
    "measure_agreement",
    "split_of_owner",
    "write_demonstration",
    "write_documents",
    "write_jsonl",
    "write_response",
    "write_world",
]
