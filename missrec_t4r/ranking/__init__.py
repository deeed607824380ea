"""What is added to the network's score when ranking, how its weights are tuned, and the baselines."""
