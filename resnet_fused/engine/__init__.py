"""What runs: the chain of units, its operators and its place in the autograd graph, and what it is compared with."""
