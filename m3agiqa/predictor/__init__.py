"""From hidden states to a mean opinion score."""
