"""Training in pure torch: fine-tuning, checkpoints, runs."""
