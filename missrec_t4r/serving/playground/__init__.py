"""Demo page for a running server: click items, see recommendations and explanations."""
