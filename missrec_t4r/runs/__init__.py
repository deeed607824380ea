"""The run folder that training writes, and its evaluation."""
