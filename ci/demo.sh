#!/usr/bin/env bash
# The whole road on this machine's CPU, twice: data -> two-stage pipeline training -> export -> proof -> server -> its proof -> curl.
#   1. SmolLM2-135M-Instruct, fine-tuned until it knows a few dialogues by heart
#   2. a small bloom, trained on dialogues from nothing
# Fails unless the trained answers come back. Needs Python >= 3.10 with venv, and curl; installs the rest. Leaves no process behind;
# its files are in ${PIPEDOCK_DEMO_DIR:-build/demo}, where the base model is kept for the next run.
set -euo pipefail
# shellcheck source=ci/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

DEMO=$ROOT/ci/demo
WORK=${PIPEDOCK_DEMO_DIR:-$ROOT/build/demo}
CHILD='' PORT='' LAST=start BEGIN=$SECONDS
declare -a TIMES=()

# run COMMAND...: in the background and waited for, so that a signal to this script is acted on at once.
run() {
  "$@" &
  CHILD=$!
  local code=0
  wait "$CHILD" || code=$?
  CHILD=''
  return "$code"
}

finish() {
  local code=$?
  trap '' INT TERM
  if [ -n "$CHILD" ]; then
    kill -TERM "$CHILD" 2>/dev/null || true
    wait "$CHILD" 2>/dev/null || true
  fi
  [ -z "$PORT" ] || "$VENV/bin/pipedock" serve --stop --port "$PORT" >&2 || true
  [ "$code" = 0 ] || say "demo: FAILED at \"$LAST\" after $((SECONDS - BEGIN)) s"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# part TITLE COMMAND...: one line of the summary.
part() {
  local start=$SECONDS
  LAST=$1
  shift
  say "" "== $LAST"
  "$@"
  TIMES+=("$(printf '%4d s  %s' $((SECONDS - start)) "$LAST")")
}

pipedock() { run "$VENV/bin/pipedock" "$@"; }
python() { run "$VENV/bin/python" "$@"; }

base_model() {
  if [ -f models/smollm2/config.json ]; then
    say "models/smollm2 is there already"
    return
  fi
  rm -rf models/smollm2.new
  python "$DEMO/smollm2.py" models/smollm2.new
  mv models/smollm2.new models/smollm2
}

serve() { # MODEL
  PORT=$(free_port)
  pipedock serve --model "$1" --port "$PORT" --detach
}

stop() {
  pipedock serve --stop --port "$PORT"
  PORT=''
}

post() { # ROUTE BODY_FILE REPLY_FILE
  curl -sSN --fail-with-body --max-time 180 "http://127.0.0.1:$PORT$1" -X POST -H 'Content-Type: application/json' \
    --data-binary @"$2" >"$3" || fail "$1 answered: $(cat "$3")"
}

ask_chat() { # DIR
  local body
  for body in "$1"/*.chat.json; do post /v1/chat/completions "$body" "${body%.json}.out"; done
}

ask_all() { # DIR
  local body
  for body in "$1"/*.generate.json; do
    post /generate "$body" "${body%.json}.out"
    post /generate_stream "$body" "${body%.generate.json}.stream.out"
  done
  ask_chat "$1"
  python "$DEMO/answers.py" client "http://127.0.0.1:$PORT" "$1"
}

untouched() { # MODEL RECORDS DIR
  python "$DEMO/answers.py" requests "$1" "$2" "$3"
  serve "$1"
  ask_chat "$3"
  stop
  python "$DEMO/answers.py" untouched "$3"
}

export_and_prove() { # RUN EXPORT
  pipedock to-hf --input "$1" --output "$2"
  pipedock verify --checkpoint "$1" --export "$2"
}

trained() { # EXPORT RECORDS DIR
  python "$DEMO/answers.py" requests "$1" "$2" "$3"
  serve "$1"
  pipedock prove --url "http://127.0.0.1:$PORT" --model "$1" --train-config "$DEMO/$(basename "$1").yaml" --records 2 --new-tokens 8
  ask_all "$3"
  stop
  python "$DEMO/answers.py" learnt "$3"
}

train() { # RUN_YAML
  pipedock data --config "$1"
  pipedock train --config "$1"
}

bloom_folder() {
  rm -rf models/bloom
  python "$DEMO/corpus.py" data/bloom.jsonl --english 64 --chinese 16
  python "$DEMO/bloom.py" data/bloom.jsonl models/bloom
}

command -v curl >/dev/null || fail "curl is not installed (Debian/Ubuntu: apt-get install curl)"
mkdir -p "$WORK"
cd "$WORK"
rm -rf runs exports asked data
export XDG_RUNTIME_DIR=$WORK/state TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

part "install" run bash "$ROOT/ci/install.sh"
part "SmolLM2: from GGUF to a Hugging Face folder" base_model
part "SmolLM2: dialogues of chatterbot-corpus" python "$DEMO/corpus.py" data/dialogues.jsonl
part "SmolLM2: answers of the untouched model" untouched models/smollm2 data/dialogues.jsonl asked/untouched
part "SmolLM2: training, 2 stages" train "$DEMO/smollm2.yaml"
part "SmolLM2: export and proof" export_and_prove runs/smollm2 exports/smollm2
part "SmolLM2: served, asked, answered as trained" trained exports/smollm2 data/dialogues.jsonl asked/smollm2
part "bloom: tokenizer and configuration" bloom_folder
part "bloom: training from scratch, 2 stages" train "$DEMO/bloom.yaml"
part "bloom: export and proof" export_and_prove runs/bloom exports/bloom
part "bloom: served, asked, answered as trained" trained exports/bloom data/bloom.jsonl asked/bloom

say "" "== demo: everything came back as trained"
printf '%s\n' "${TIMES[@]}" "$(printf '%4d s  in all' $((SECONDS - BEGIN)))"
