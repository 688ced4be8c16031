"""From the bytes of a picture to the pixels of a row."""
