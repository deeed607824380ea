"""The generated shop: interactions, texts and images without any download."""
