"""From a run to a bundle (everything that serving needs and nothing else) and to a Triton model repository."""
