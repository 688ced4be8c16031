"""Processes and what they exchange."""
