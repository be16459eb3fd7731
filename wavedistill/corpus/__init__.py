"""From recordings as people have them to the segments that a training draws."""
