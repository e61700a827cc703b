"""Lightning data modules: one data set, one file."""

from sparc3_lightning.data.base import NoSamples
from sparc3_lightning.data.c4 import C4
from sparc3_lightning.data.evaluation_data import EvaluationData
from sparc3_lightning.data.real_toxicity_prompts import RealToxicityPrompts
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.data.wikitext2 import WikiText2

__all__ = ["C4", "EvaluationData", "NoSamples", "RealToxicityPrompts", "ToxicPrompts", "WikiText2"]
