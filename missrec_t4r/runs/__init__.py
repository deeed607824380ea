"""The run folder that training writes, its evaluation, and the cache of finished runs."""
