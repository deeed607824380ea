"""A demo page beside a running server."""
