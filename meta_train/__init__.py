"""Meta-training of an update rule on families of tasks: unroll, estimate, step."""
