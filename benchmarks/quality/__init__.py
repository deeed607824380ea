"""Quality benchmarks: recipes chosen on validation, the test split scored once per recipe and seed."""
