"""Lightning data modules: one data set, one file."""

from sparc3_lightning.data.base import NoSamples
from sparc3_lightning.data.c4 import C4
from sparc3_lightning.data.evaluation_data import EvaluationData
from sparc3_lightning.data.ioi import IOI
from sparc3_lightning.data.real_toxicity_prompts import RealToxicityPrompts
from sparc3_lightning.data.sentence_pairs import SentencePairs
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.data.wikitext2 import WikiText2

__all__ = [
    "C4",
    "IOI",
    "EvaluationData",
    "NoSamples",
    "RealToxicityPrompts",
    "SentencePairs",
    "ToxicPrompts",
    "WikiText2",
]
