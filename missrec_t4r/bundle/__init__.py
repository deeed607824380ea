"""The serving bundle: its files, their validation, and catalogue updates. Below serving and export."""
