#!/bin/sh
# Train the generators of `vlm_course.compare` from nothing, one after the other, then compare them.
#
#     sh recipes/generators.sh [FOLDER]      runs go to FOLDER (default: runs)
#
# On one thread with a core to itself each of the five learned for about 35 minutes, the VQ-VAE that three
# of them share for 10. A run that was stopped goes on where it was.
set -eu
out=${1:-runs}

learn() { # METHOD NAME STEPS [FLAG ...]
    method=$1 name=$2 steps=$3
    shift 3
    python -m vlm_course.train "$method" --data emoji --size 64 --steps "$steps" --out "$out/$name" \
        --resume true "$@"
}

draw() { # the same, on the 1,824 drawings of faces, persons and objects, in twelve classes
    learn "$@" --label '[group, style]' --only \
        '["subgroup=face-*", "subgroup=cat-face", "subgroup=monkey-face", "subgroup=person*", "group=objects"]'
}

draw dcgan dcgan_emoji_64 9000 --upsample resize
draw stylegan stylegan_emoji_64 10000 --r1 1.0
learn vqvae vqvae_emoji_64 5000
codes=$out/vqvae_emoji_64
draw transformer transformer_emoji_64 6000 --mirror true --tokenizer "$codes"
draw maskgit maskgit_emoji_64 6000 --mirror true --tokenizer "$codes"
draw flow flow_emoji_64 14000 --tokenizer "$codes"

# Not in the table: all concepts, told by their names. `python -m vlm_course.sample` takes --prompt.
learn transformer transformer_emoji_text 3500 --tokenizer "$codes" --label '[style, name_en]' \
    --word_dropout 0.1

python -m vlm_course.compare "$out/dcgan_emoji_64" "$out/stylegan_emoji_64" "$out/transformer_emoji_64" \
    "$out/maskgit_emoji_64" "$out/flow_emoji_64" --out "$out/comparison.csv"
