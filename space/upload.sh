#!/usr/bin/env bash
# Put the page onto a Hugging Face Space, or bring it up to date:
#
#     bash space/upload.sh USER/SPACE MODEL [MODEL ...]
#
# USER/SPACE is created when it is not there; the MODELs are Hub ids. Needs `hf auth login` with a token that may write.
# The Space needs the secret HF_TOKEN when a model is private: hf spaces secrets add USER/SPACE --secrets HF_TOKEN
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: bash space/upload.sh USER/SPACE MODEL [MODEL ...]" >&2
    exit 2
fi
space=$1
shift
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

mkdir -p "$folder/madm_utils" "$folder/space"
cp demo_app.py "$folder/"
cp madm_utils/*.py madm_utils/*.md madm_utils/*.css madm_utils/*.js "$folder/madm_utils/"
cp -r space/examples "$folder/space/"
cp requirements-demo.txt "$folder/requirements.txt"
models=$(printf ', "%s"' "$@")
sed "s|^models: .*|models: [${models:2}]|" space/README.md > "$folder/README.md"

hf repos create "$space" --type space --sdk gradio --exist-ok
hf spaces variables add "$space" --env "MADM_MODELS=$*"
hf upload "$space" "$folder" . --type space --delete "*" --commit-message "Page to try MADM models"
