"""Stage one: from videos to Tracks."""

ENCODERS = {
    "mae": "vacli.extract.mae:Mae",
    "logmel": "vacli.extract.logmel:LogMel",
}
