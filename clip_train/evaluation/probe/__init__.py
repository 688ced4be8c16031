"""Linear classifiers on frozen image features, with all labels and with a few."""
