"""Stage one: from videos to Tracks."""

ENCODERS = {
    "mae": "vacli.extract.mae:Mae",
    "iresnet": "vacli.extract.iresnet:IResNet",
    "timm": "vacli.extract.timm_encoder:Timm",
    "logmel": "vacli.extract.logmel:LogMel",
    "vggish": "vacli.extract.vggish:VGGish",
    "hf-audio": "vacli.extract.hf_audio:HfAudio",
}
# What is a video by its name.
SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"})
