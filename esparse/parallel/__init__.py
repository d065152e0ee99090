"""Several processes and several cores at work on one run."""
