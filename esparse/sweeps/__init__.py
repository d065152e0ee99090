"""Many runs in a queue: submitted, carried out on a node, and looked after from any terminal."""
