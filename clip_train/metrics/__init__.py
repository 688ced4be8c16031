"""What a run reports while it trains, and where."""
