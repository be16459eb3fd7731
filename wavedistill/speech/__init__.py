"""What is special about speech: log-mel, F0, linear prediction."""
