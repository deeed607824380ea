"""Score terms added to the network's score, the tuning of their blend weights on validation, and the baselines."""
