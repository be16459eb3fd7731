"""A trained model as a person uses it."""
