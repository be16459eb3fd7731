"""What the program needs of the system it runs on; knows neither sound nor models."""
