"""From session vectors to the exact top-k items: index, bounds, filters, explanations."""
