"""Published checkpoints in and out, one file a family, and operations on models.

model = zoo.convert.load("meta-llama/Llama-3.2-1B")     # a ZooForCausalLM
zoo.convert.save(model, "folder")                       # back in the format it came from
sparse = zoo.convert.upcycle(model.model, experts=8)    # LanguageModel -> LanguageModel; moefy, share_kv
"""

from zoo.convert.moefy import moefy
from zoo.convert.published import convert, load, save
from zoo.convert.share_kv import share_kv
from zoo.convert.upcycle import upcycle

__all__ = ["convert", "load", "moefy", "save", "share_kv", "upcycle"]
