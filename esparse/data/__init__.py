"""Text and token sequences. This package does not know what sparsity is."""
