"""The name and the versions of esparse's format, as config.json has them. Standard library only."""

FORMAT_NAME = "esparse"
VERSION = 2
WITH_GRID = 3  # the version of a checkpoint whose values are codes, which earlier ones cannot read
ORDERS = ("original", "physical")  # of the columns, on disk
READS = (1, 2, 3)  # version 1 did not have WITHOUT_ESPARSE

# The entry `transformers_weights` of config.json names the file of the weights. What stands there is no such name, so
# that transformers alone ends with this sentence, whichever class is asked for and whatever code it may run; once
# esparse is imported, the quantizer takes the entry away. (An unknown model_type, or an auto_map, stops the Auto
# classes only: LlamaForCausalLM.from_pretrained went on, with random weights.)
WITHOUT_ESPARSE = (
    "the weights are packed by esparse (pip install esparse), which is to be imported before they are loaded"
)
