"""Choices between a few captions or pictures: SugarCrepe, Winoground, ARO, CountBench and own sets."""
