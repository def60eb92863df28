"""Stage one: from videos to Tracks."""

ENCODERS = {
    "mae": "vacli.extract.mae:Mae",
    "logmel": "vacli.extract.logmel:LogMel",
}
# What is a video by its name.
SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"})
