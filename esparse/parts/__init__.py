"""The parts that a user can choose: which numbers they have, who else brings some, and which libraries they need."""
