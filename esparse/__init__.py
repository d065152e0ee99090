"""esparse: one-shot N:M sparsity of large language models, measured."""

__version__ = "0.1.0"
