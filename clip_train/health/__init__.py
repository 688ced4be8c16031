"""Watch a run: what goes wrong is noticed on every rank alike, said once and written to `events.jsonl`."""
