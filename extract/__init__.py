"""Stage one: from videos to Tracks."""

ENCODERS = {
    "mae": "vacli.extract.mae:Mae",
    "iresnet": "vacli.extract.iresnet:IResNet",
    "timm": "vacli.extract.timm_encoder:Timm",
    "logmel": "vacli.extract.logmel:LogMel",
    "vggish": "vacli.extract.vggish:VGGish",
    "hf-audio": "vacli.extract.hf_audio:HfAudio",
}
# What is a video by its name: what a container of media.py's list is usually called.
_OF_CONTAINERS = "mp4 m4v mov qt 3gp 3g2 f4v mkv webm avi mpg mpeg mpe vob ts mts m2ts flv wmv asf ogv mxf"
SUFFIXES = frozenset(f".{suffix}" for suffix in _OF_CONTAINERS.split())
