"""Where runs are at work: whose they are, how they stand, and what a queue says of them."""
