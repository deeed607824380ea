"""Export a run to a bundle and a Triton model repository, with the parity checks. Above serving and bundle."""
