#!/usr/bin/env bash
# Real traces without a video: the studyforrest annotations of one film ("Forrest Gump") into a feature store.
#
#   examples/studyforrest.sh PATH [STORE [arousal]]
#
# PATH is a folder with the files conf_audio_run-*, conf_visual_run-* and emotions_av_1s_events_run-* (.tsv.gz) of
# github.com/psychoinformatics-de/studyforrest-data-annotations (CC0). STORE is features.zarr by default. Stopped at
# any point, or called again: what is stored is kept.
#
# The film was shown in eight runs; each becomes one video, run-1 .. run-8, with
#   sf.audio   loudness (rms) and left-right difference (lrdiff), 25 rows a second
#   sf.visual  brightness (brmean), its left-right (brlr) and up-down (brud) difference, and how much the picture
#              differs from the one before (norm_diff), 25 rows a second; phash is a hash in hexadecimal: left out
#   label.va   valence and arousal, one row a second, with gaps where no character showed an emotion
#
# Caveat: nobody rated valence. Nine observers said whether an emotion of a character was positive and whether it was
# negative (shares from 0 to 1), and arousal from -1 to 1. Here valence = valence_positive - valence_negative, the mean
# over the characters on screen. These features carry no signal of it: train on it if you like, do not report it. A
# valence of 0 throughout has no gradient (the CCC of what never moves is 0, whatever is predicted), so that a head
# learns arousal alone and stops by it; the mean it prints is then half of arousal's CCC.
set -euo pipefail

if [ $# -lt 1 ] || [ $# -gt 3 ] || [ ! -d "$1" ] || [ "${3:-arousal}" != arousal ]; then
  echo "usage: $0 PATH [STORE [arousal]]   (PATH: the folder with conf_audio_run-1_events.tsv.gz and the others)" >&2
  exit 2
fi
if ! command -v vacli > /dev/null; then
  echo "$0: there is no vacli on the PATH; activate its environment first (. .venv/bin/activate)" >&2
  exit 2
fi
data=$(cd "$1" && pwd)
store=${2:-features.zarr}

# Files are joined to videos by their names, so each gets the name of its run.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/audio" "$work/visual" "$work/labels"
for run in 1 2 3 4 5 6 7 8; do
  for file in conf_audio conf_visual emotions_av_1s_events; do
    if [ ! -f "$data/${file}_run-${run}_events.tsv.gz" ]; then
      echo "$0: $data has no ${file}_run-${run}_events.tsv.gz; wanted the files of all eight runs" >&2
      exit 2
    fi
  done
  ln -s "$data/conf_audio_run-${run}_events.tsv.gz" "$work/audio/run-$run.tsv.gz"
  ln -s "$data/conf_visual_run-${run}_events.tsv.gz" "$work/visual/run-$run.tsv.gz"
done

# The emotions are events: from `onset`, for `duration` whole seconds, one for each character. Made into one row a
# second: the mean over the characters, and empty cells where there is none. (The grid of a run starts at a fraction
# of a second, the same for all its events.)
python3 - "$data" "$work/labels" "${3:-both}" <<'PYTHON'
import csv
import gzip
import sys
from collections import defaultdict
from pathlib import Path

data, out = map(Path, sys.argv[1:3])
rated = {"both": 1.0, "arousal": 0.0}[sys.argv[3]]  # how much of valence is kept
for run in range(1, 9):
    start, seconds = 0.0, defaultdict(list)  # of the grid; its second -> the judgements of its characters
    with gzip.open(data / f"emotions_av_1s_events_run-{run}_events.tsv.gz", "rt") as f:
        for event in csv.DictReader(f, delimiter="\t"):
            second, start = divmod(float(event["onset"]), 1)
            valence = rated * (float(event["valence_positive"]) - float(event["valence_negative"]))
            for i in range(round(float(event["duration"]))):
                seconds[int(second) + i].append((valence, float(event["arousal"])))
    with open(out / f"run-{run}.csv", "w") as f:
        f.write("onset,duration,valence,arousal\n")
        for second in range(max(seconds) + 1):
            judged = seconds.get(second)
            means = [sum(column) / len(judged) for column in zip(*judged)] if judged else ["", ""]
            f.write(f"{start + second:.2f},1,{means[0]},{means[1]}\n")
PYTHON

# The middle of a row is onset + duration / 2; vacli finds both columns by themselves.
vacli store import "$work/audio" --track sf.audio --columns rms,lrdiff --store "$store"
vacli store import "$work/visual" --track sf.visual --columns brmean,brlr,brud,norm_diff --store "$store"
vacli store import "$work/labels" --track label.va --store "$store"
# This should give:
#   sf.audio: 8 stored, 0 kept, 0 refused
#   sf.visual: 8 stored, 0 kept, 0 refused
#   label.va: 8 stored, 0 kept, 0 refused

vacli store ls --store "$store"
# This should give: eight videos run-1 .. run-8 with three tracks each: 180,759 rows of sf.audio, 180,783 of sf.visual,
# and of label.va 4,842 rows with a label among 7,055.

cat <<EOF

The store is ready. Train on it, for example the linear baseline on windows of 60 s (the clock is that of the labels):

  vacli train --head linear --stream sf.audio --stream sf.visual --set windows.length=60 --set windows.stride=30 --store $store

Look at arousal only: what these features say of valence means nothing. benchmarks/studyforrest.py leaves out one run
after the other (python -m benchmarks studyforrest).
EOF
