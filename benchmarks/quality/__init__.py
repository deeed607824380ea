"""Quality benchmarks: recipes are chosen on validation, the test split is scored once per recipe and seed."""
