"""One temperature for a model's probabilities, and how far they can be believed before and after."""
