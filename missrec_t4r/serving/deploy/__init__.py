"""Blue/green deployment on a running Triton: smoke test, traffic switch, rollback."""
