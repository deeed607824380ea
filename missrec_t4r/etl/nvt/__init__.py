"""NVTabular: our operators, the session and request workflows, their storage, and the adoption of existing ones."""
