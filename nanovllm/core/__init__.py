"""What crosses rooms: steps, the model's configuration, metrics. No torch."""
