"""Blue/green deployment on a running Triton, with smoke test and rollback."""
