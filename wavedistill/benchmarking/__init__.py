"""How fast models draw and learn, and what the figures mean."""
