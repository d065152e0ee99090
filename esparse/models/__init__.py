"""Models as a list of decoder blocks; this package knows nothing of sparsity."""
