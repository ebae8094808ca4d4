# What the launch scripts share: arguments, --dry-run, and the command of a run. A script sources it once
# CONFIG, WORKDIR and ARGS are set.
# shellcheck shell=bash

# shellcheck disable=SC2034 # the scripts use it
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) # the clone
WORKDIR=${WORKDIR%/}

read -ra MAIN <<<"$ARGS"
MAIN=(-m spin_jax.main "--config=$CONFIG" "--workdir=$WORKDIR" ${MAIN[@]+"${MAIN[@]}"}) # python's arguments

# fail MESSAGE…: bad input.
fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# parse "SUBCOMMANDS" ARGUMENTS…: sets SUBCOMMAND, and DRY_RUN to 1 or nothing.
parse() {
  local known=$1 word
  shift
  SUBCOMMAND="" DRY_RUN=""
  for word in "$@"; do
    case $word in
      -h | --help)
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" # the comment at its head
        exit 0
        ;;
      --dry-run) DRY_RUN=1 ;;
      *[!a-z]* | "") fail "unknown argument '$word'; see --help" ;;
      *)
        [[ " $known " == *" $word "* ]] || fail "unknown argument '$word'; see --help"
        [ -z "$SUBCOMMAND" ] || fail "'$SUBCOMMAND' and '$word' are two commands: one at a time"
        SUBCOMMAND=$word
        ;;
    esac
  done
  [ -z "$known" ] || [ -n "$SUBCOMMAND" ] || fail "which of ${known// /, }? see --help"
}

# quoted WORDS…: the words as a line of shell.
quoted() {
  local word line=""
  for word in "$@"; do
    case $word in
      "" | *[!A-Za-z0-9_./:=,@%+-]*) word="'$(printf %s "$word" | sed "s/'/'\\\\''/g")'" ;;
    esac
    line="$line $word"
  done
  printf '%s\n' "${line# }"
}

# run WORDS…: runs the command; with --dry-run, prints it.
run() {
  if [ -n "$DRY_RUN" ]; then quoted "$@"; else "$@"; fi
}

# in_bucket: fails where WORKDIR is no folder of a bucket.
in_bucket() {
  case $WORKDIR in
    gs://my-bucket/*) [ -n "$DRY_RUN" ] || fail "set WORKDIR=gs://BUCKET/FOLDER to a bucket of yours" ;;
    gs://*/*) ;;
    *) fail "WORKDIR=$WORKDIR: every host writes there, so it must be gs://BUCKET/FOLDER" ;;
  esac
}
