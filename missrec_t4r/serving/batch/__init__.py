"""Offline jobs with the served model: scoring, similar items, vector export."""
