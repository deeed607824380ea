"""Batch jobs with the served model, without a server: scoring, similar items, vector export."""
