"""The parts that a user can choose: their numbers, plug-ins of other packages, and the libraries they need."""
