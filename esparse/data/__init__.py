"""Text and token sequences; this package knows nothing of sparsity."""
