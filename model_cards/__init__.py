"""Model cards: the facts of a training run as a README with metadata the Hub reads, and the figures beside it."""
