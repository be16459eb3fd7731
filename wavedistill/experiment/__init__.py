"""An experiment's folder, and which of its files are current."""
