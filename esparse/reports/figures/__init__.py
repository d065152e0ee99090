"""Many records as pictures."""
