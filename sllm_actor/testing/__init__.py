"""What tests stand on: builders, simulated clusters, questions with known answers."""
