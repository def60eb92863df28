"""Stage two: from Tracks to valence and arousal."""
