"""Training in plain PyTorch: fine-tuning, pre-training, warm starts; optimiser, precision, data parallelism."""
