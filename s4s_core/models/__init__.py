"""Models by name, the networks behind them, and other people's models."""
