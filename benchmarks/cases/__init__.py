"""One module a family of ops; each has `CASES`, a list of registry.Case."""
