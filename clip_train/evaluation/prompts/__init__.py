"""Class names and templates, and the classifier that is made of them."""
