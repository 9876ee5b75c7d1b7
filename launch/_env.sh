# Sourced by the launch scripts: the repository as working folder, and a virtual environment with diffjax in it.
#
#   source launch/_env.sh; prepare test        # extras of setup.py, separated by commas
#
# An active environment is used as it is; otherwise .venv in the repository is made. Packages are installed
# when setup.py has changed since the last time, and only then a package registry is needed.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

fail() {
  echo "error: $*" >&2
  exit 2
}

# Shows a command, then runs it.
run() {
  echo
  echo "> $*"
  "$@"
}

# The folder of the environment that `prepare` uses.
environment() {
  echo "${VIRTUAL_ENV:-${CONDA_PREFIX:-$PWD/.venv}}"
}

# Shows a command as it can be typed; with --dry_run that is all.
act() {
  printf '>'
  printf ' %q' "$@"
  echo
  [ "$dry_run" = yes ] || "$@"
}

# For scripts that pass their flags on to diffjax.cli.train: sets `arguments` (quoted, without --dry_run), `workdir`,
# `checkpoints` (--config.train.checkpoint_folder) and `dry_run` (yes or no), and fails before anything is installed or
# queued. Flags that `own` names are the script's: each sets the variable of its name, to "yes" where it has no value.
# shellcheck disable=SC2034  # used by the scripts
read_arguments() {
  local argument flag config=
  arguments='' workdir='' checkpoints='' dry_run=no
  for argument in "$@"; do
    flag=${argument#--} && flag=${flag%%=*}
    if [[ " ${own:-} " == *" $flag "* ]]; then
      case "$argument" in
        --*=*) printf -v "$flag" %s "${argument#*=}" && continue ;;
        --*) printf -v "$flag" yes && continue ;;
      esac
    fi
    case "$argument" in
      --dry_run) dry_run=yes && continue ;;
      --config=*) config=${argument#*=} ;;
      --workdir=*) workdir=${argument#*=} ;;
      --config.train.checkpoint_folder=*) checkpoints=${argument#*=} ;;
    esac
    arguments+=" $(printf %q "$argument")"
  done
  [ -n "$config" ] || fail "--config is missing; for example --config=configs/quick/edm_digits.py"
  [ -f "${config%%:*}" ] || fail "config file ${config%%:*} does not exist; there are: $(echo configs/*/*.py)"
  [ -n "$workdir" ] || fail "--workdir is missing; for example --workdir=runs/digits_teacher"
}

# whole NAME LEAST: fails unless the flag of that name is a whole number.
whole() {
  [[ "${!1}" =~ ^[0-9]{1,6}$ ]] && [ "${!1}" -ge "$2" ] ||
    fail "found --$1=${!1}, expected a whole number, $2 or more: type --$1=$2"
}

# matches NAME PATTERN EXAMPLE: fails unless the flag of that name is there and fits the whole pattern.
matches() {
  [ -n "${!1}" ] || fail "--$1 is missing; for example --$1=$3"
  [[ "${!1}" =~ ^($2)$ ]] || fail "found --$1=${!1}, which does not fit $2; for example --$1=$3"
}

# What several hosts write must lie where all of them, and those that come after them, find it.
shared_folder() {
  [[ "$workdir" == /* || "$checkpoints" == gs://* ]] ||
    fail "found --workdir=$workdir, which each host has for itself: type $1, or \
--config.train.checkpoint_folder=gs://BUCKET/RUN"
}

# with_bucket EXTRAS: the extras, and what a bucket needs where there is one.
with_bucket() {
  [[ "$checkpoints" == gs://* ]] && echo "$1,bucket" || echo "$1"
}

# tpu_hosts NAME TYPE: sets `generation` and `hosts` of a TPU slice. Fails for another word, naming the flag or variable.
# shellcheck disable=SC2034
tpu_hosts() {
  [[ "$2" =~ ^(v[2-4]|v5p|v5litepod|v6e)-([1-9][0-9]{0,4})$ ]] ||
    fail "found $1=$2, expected v2-N v3-N v4-N v5p-N (N cores) or v5litepod-N v6e-N (N chips), such as v5litepod-16"
  generation=${BASH_REMATCH[1]} hosts=$(((BASH_REMATCH[2] + 7) / 8)) # eight cores, or a single host's eight chips
  case "$2" in
    v5litepod-8 | v6e-8) ;;
    v5litepod-* | v6e-*) hosts=$(((BASH_REMATCH[2] + 3) / 4)) ;; # four chips
  esac
}

# Only what is committed travels to other machines.
committed() {
  [ -z "$(git status --porcelain --untracked-files=no)" ] || fail "found changes that are not committed: $1 gets the last commit"
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "found $(python3 --version 2>&1), expected Python 3.11 to 3.13: install one, or type PYTHON=/path/to/python bash $0"
}

prepare() {
  local extras=$1
  if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
      local python
      python=$(find_python)
      echo "making .venv with $("$python" --version)"
      "$python" -m venv .venv || fail "could not make .venv: install the venv module of $python (Debian: apt install python3-venv)"
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
  fi
  local stamp
  stamp="$(python -c 'import sys; print(sys.prefix)')/.diffjax-$extras"
  local sum
  sum=$(cksum <setup.py)
  if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$sum $PWD" ]; then
    python -m pip download --quiet --no-deps --retries 0 --timeout 20 --dest "$(mktemp -d)" setuptools wheel >/dev/null 2>&1 ||
      fail "no package registry answers, and packages must be installed: connect to a network (or set PIP_INDEX_URL), then run this again"
    echo "installing diffjax[$extras]"
    python -m pip install --quiet --disable-pip-version-check -e ".[$extras]" || fail "the installation failed, see above"
    echo "$sum $PWD" >"$stamp"
  fi
  export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax}"
}
