"""Drop-in replacements for torch functions where a CPU profits."""
